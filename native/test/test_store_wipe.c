/* SPDX-License-Identifier: MIT
 *
 * Freed means gone: a marker that was written, and then discarded, overwritten, punched or moved,
 * is not to be found in the region or on the store's desks.
 */
#include "fixture.h"

#define NR_PAGES 200
#define MARKER "zswapfs-marker-5b1e77a2c94d"
#define MARKER_BYTES (sizeof(MARKER) - 1)

static uint8_t page[PAGE_BYTES], before[PAGE_BYTES];

/* In the part of the region that is there? */
static bool region_holds(const struct region *region, const void *what, size_t bytes)
{
	const char *base = (const char *)region->header;
	off_t end = (off_t)region->geometry.total_bytes, at = 0;

	while (at < end && (at = lseek(region->fd, at, SEEK_DATA)) >= 0) {
		off_t hole = lseek(region->fd, at, SEEK_HOLE);

		if (memmem(base + at, (size_t)(hole - at), what, bytes))
			return true;
		at = hole;
	}
	return false;
}

/* In the region, or on one of the desks? */
static bool is_found(struct store *store, const void *what, size_t bytes)
{
	bool found;

	pthread_mutex_lock(&store->region->keeping);
	found = region_holds(store->region, what, bytes);
	pthread_mutex_unlock(&store->region->keeping);
	return found ||
	       memmem(store->scratch, sizeof(struct scratch) * REGION_NR_COUNTERS, what, bytes);
}

static bool marker_is_found(struct store *store)
{
	return is_found(store, MARKER, MARKER_BYTES);
}

/* A page with the marker in it, kept as LZ4 (the marker is a literal) or raw. */
static void write_marker(struct store *store, uint64_t index, enum page_kind kind)
{
	make_page(page, kind, index + 1);
	memcpy(page + 1000, MARKER, MARKER_BYTES);
	assert_int_equal(store_write(store, index, 1, page), 1);
	assert_true(marker_is_found(store));
}

static void write_plain(struct store *store, uint64_t index, enum page_kind kind)
{
	make_page(page, kind, index + 1);
	assert_int_equal(store_write(store, index, 1, page), 1);
}

static void with_each(void (*test)(struct store *, enum page_kind))
{
	static const uint32_t chunk_sizes[] = {4096, 16384, 65536};

	for (size_t c = 0; c < ARRAY_SIZE(chunk_sizes); c++) {
		for (int k = 0; k < 2; k++) {
			int fd = open_memory();
			struct store *store =
				open_store(fd, NR_PAGES, chunk_sizes[c], 0, 128 * KIB);

			for (uint64_t i = 0; i < 40; i++)
				write_plain(store, i, (enum page_kind)(i % NR_PAGE_KINDS));
			test(store, k ? PAGE_RANDOM : PAGE_SPARSE);
			assert_sound(store);
			store_destroy(store);
			close(fd);
		}
	}
}

static void discarded(struct store *store, enum page_kind kind)
{
	write_marker(store, 50, kind);
	assert_int_equal(store_discard(store, 50, 1), 1);
	assert_false(marker_is_found(store));
}

static void test_discarded_pages_are_gone(void **state)
{
	(void)state;
	with_each(discarded);
}

static void overwritten(struct store *store, enum page_kind kind)
{
	write_marker(store, 50, kind);
	write_plain(store, 50, PAGE_TEXT);
	assert_false(marker_is_found(store));
	write_marker(store, 50, kind);
	write_plain(store, 50, PAGE_WORD_64);
	assert_false(marker_is_found(store));
}

static void test_overwritten_pages_are_gone(void **state)
{
	(void)state;
	with_each(overwritten);
}

static void punched(struct store *store, enum page_kind kind)
{
	write_marker(store, 50, kind);
	assert_int_equal(store_punch(store, 50 * PAGE_BYTES + 900, 300), 0);
	assert_false(marker_is_found(store));
}

static void test_punched_bytes_are_gone(void **state)
{
	(void)state;
	with_each(punched);
}

static void partly_read_and_changed(struct store *store, enum page_kind kind)
{
	uint8_t bytes[64];

	write_marker(store, 50, kind);
	assert_int_equal(store_pread(store, 50 * PAGE_BYTES + 1000, 20, bytes), 20);
	assert_int_equal(store_pwrite(store, 50 * PAGE_BYTES + 3000, 20, bytes), 20);
	assert_int_equal(store_discard(store, 50, 1), 1);
	assert_false(marker_is_found(store));
}

/* Reading or changing a part of a page leaves no copy of the rest behind. */
static void test_partial_requests_leave_nothing(void **state)
{
	(void)state;
	with_each(partly_read_and_changed);
}

static void moved(struct store *store, enum page_kind kind)
{
	for (uint64_t i = 50; i < 110; i++)
		write_marker(store, i, kind);
	for (uint64_t i = 50; i < 110; i++)
		if (i % 7)
			assert_int_equal(store_discard(store, i, 1), 1);
	store_compact(store, UINT64_MAX);
	assert_sound(store);
	store_discard(store, 50, 60);
	assert_false(marker_is_found(store));
}

/* Compaction leaves no copy where a page was. */
static void test_moved_pages_are_gone(void **state)
{
	(void)state;
	with_each(moved);
}

static void refused(struct store *store, enum page_kind kind)
{
	struct store *small;
	int fd = open_memory();

	(void)store;
	small = open_store(fd, NR_PAGES, 65536, 64 * KIB, 0);
	for (uint64_t i = 0; i < 20; i++) {
		make_page(page, PAGE_RANDOM, i);
		store_write(small, i, 1, page);
	}
	make_page(page, PAGE_RANDOM, kind);
	memcpy(page + 1000, MARKER, MARKER_BYTES);
	assert_int_equal(store_write(small, 100, 1, page), -ENOSPC);
	assert_false(marker_is_found(small));
	store_destroy(small);
	close(fd);
}

/* A write that was refused was never there. */
static void test_refused_pages_are_gone(void **state)
{
	(void)state;
	with_each(refused);
}

/* A word that was on its way into the word table, or out of it, when a process died. */
static void test_words_of_the_dead_are_gone(void **state)
{
	const uint64_t word = 0xf1e2d3c4b5a69788;
	int fd = open_memory();
	struct store *store = open_store(fd, 100000, 65536, 0, 0);
	uint64_t tables;

	(void)state;
	write_plain(store, 3, PAGE_WORD_64);
	write_plain(store, 4, PAGE_TEXT);
	write_plain(store, 90000, PAGE_TEXT);
	memcpy(before, page, PAGE_BYTES);
	for (uint64_t at = 6; at <= 11; at++)
		if (at != slot_word_at(3, slot_state(store->region->slots[3])))
			store->region->words[at] = word;
	assert_true(is_found(store, &word, sizeof(word)));
	region_replenish(store->region);
	tables = stats_of(store).table_bytes;
	store_destroy(store);
	assert_int_equal(store_adopt(&store, fd), 0);
	assert_false(is_found(store, &word, sizeof(word)));
	/* Neighbours have words now. */
	assert_true(store->region->words_used);
	assert_int_equal(store_read(store, 90000, 1, page), 1);
	assert_memory_equal(page, before, PAGE_BYTES);
	assert_sound(store);
	/* No page of the tables was touched for that. */
	assert_int_equal(stats_of(store).table_bytes, tables);
	store_destroy(store);
	close(fd);
}

/* The word of a same-filled page, in the slot or in the word table. */
static void test_repeated_words_are_gone(void **state)
{
	const uint64_t word = 0xf1e2d3c4b5a69788;
	int fd = open_memory();
	struct store *store = open_store(fd, NR_PAGES, 65536, 0, 0);

	(void)state;
	for (int round = 0; round < 3; round++) {
		fill_word(page, word);
		assert_int_equal(store_write(store, 3, 1, page), 1);
		assert_true(is_found(store, &word, sizeof(word)));
		if (round == 0)
			assert_int_equal(store_discard(store, 3, 1), 1);
		else if (round == 1)
			write_plain(store, 3, PAGE_WORD_64);
		else
			write_plain(store, 3, PAGE_TEXT);
		assert_false(is_found(store, &word, sizeof(word)));
	}
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

/* What a dead worker left half done is gone after the rebuild. */
static void test_orphans_are_gone_after_rebuild(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, NR_PAGES, 65536, 0, 0);

	(void)state;
	for (uint64_t i = 0; i < 30; i++)
		write_plain(store, i, PAGE_TEXT);
	write_marker(store, 50, PAGE_SPARSE);
	write_marker(store, 51, PAGE_RANDOM);
	for (uint64_t i = 30; i < 40; i++)
		write_plain(store, i, PAGE_TEXT);
	atomic_store(&store->region->slots[50], 0);
	atomic_store(&store->region->slots[51], 0);
	store_destroy(store);
	assert_int_equal(store_adopt(&store, fd), 0);
	assert_sound(store);
	assert_false(marker_is_found(store));
	store_destroy(store);
	close(fd);
}

/* The secret's bytes are never together in memory but where the store put them: here they are
 * masked, and whoever compares unmasks one at a time. */
#define SECRET_BYTES 24
static volatile const uint8_t masked_secret[SECRET_BYTES] = {
	0x91, 0x3c, 0xf7, 0x08, 0x6d, 0xe2, 0x55, 0xba, 0x1f, 0xc4, 0x73, 0xd8,
	0x2b, 0x86, 0xe9, 0x40, 0xb5, 0x1a, 0x6f, 0xcc, 0x33, 0x98, 0x07, 0x5e};
#define SECRET_MASK 0xa5

static void put_secret(uint8_t *to)
{
	for (int i = 0; i < SECRET_BYTES; i++)
		to[i] = masked_secret[i] ^ SECRET_MASK;
}

/* Half of it is enough: content is copied in pieces of 8 or 16 bytes. */
static uint32_t count_secrets(const uint8_t *bytes, size_t nr)
{
	const uint8_t first = masked_secret[0] ^ SECRET_MASK;
	uint32_t found = 0;

	for (const uint8_t *at = bytes; nr >= SECRET_BYTES / 2; at++) {
		size_t left = nr - (size_t)(at - bytes) - SECRET_BYTES / 2 + 1;
		int i = 0;

		if (left > nr || !(at = memchr(at, first, left)))
			break;
		while (i < SECRET_BYTES / 2 && at[i] == (masked_secret[i] ^ SECRET_MASK))
			i++;
		found += i == SECRET_BYTES / 2;
	}
	return found;
}

/* In all mappings of this process but @window, what it is looked at through. */
static uint32_t secrets_in_process(uint8_t *window, size_t window_bytes)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	int mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	uint32_t found = 0;
	uintptr_t from, to;
	char line[512];

	assert_true(maps && mem >= 0);
	while (fgets(line, sizeof(line), maps)) {
		assert_int_equal(sscanf(line, "%lx-%lx", &from, &to), 2);
		if (from <= (uintptr_t)window && (uintptr_t)window < to)
			continue;
		for (uintptr_t at = from; at < to; at += window_bytes - PAGE_BYTES) {
			size_t nr = to - at < window_bytes ? to - at : window_bytes;
			ssize_t got = pread(mem, window, nr, (off_t)at);

			if (got <= 0)
				break; /* [vvar] and the like */
			found += count_secrets(window, (size_t)got);
		}
	}
	explicit_bzero(window, window_bytes);
	close(mem);
	fclose(maps);
	return found;
}

static void write_secret(struct store *store, uint64_t index, enum page_kind kind)
{
	make_page(page, kind, index + 1);
	put_secret(page + 1000);
	assert_int_equal(store_write(store, index, 1, page), 1);
	explicit_bzero(page, sizeof(page));
}

/* Everything that pages go through: written alone and in batches, read, read and changed in part,
 * looked at, checked, moved; in another thread, too. */
static void *use_secrets(void *arg)
{
	struct store *store = arg;
	static uint8_t pages[40 * PAGE_BYTES];
	char message[160];
	uint32_t state;

	for (uint64_t i = 50; i < 90; i++) {
		write_secret(store, i, i % 2 ? PAGE_TEXT : PAGE_RANDOM);
		assert_true(store_stored(store, i, pages, &state) > 0);
	}
	assert_int_equal(store_read(store, 50, 40, pages), 40);
	assert_int_equal(store_write(store, 90, 40, pages), 40);
	assert_int_equal(store_pread(store, 51 * PAGE_BYTES + 900, 5000, pages), 5000);
	assert_int_equal(store_pwrite(store, 60 * PAGE_BYTES + 900, 5000, pages), 5000);
	assert_int_equal(store_check(store, message), 0);
	for (uint64_t i = 50; i < 130; i += 3)
		assert_true(store_discard(store, i, 2) >= 0);
	store_compact(store, UINT64_MAX);
	assert_int_equal(store_check(store, message), 0);
	explicit_bzero(pages, sizeof(pages));
	return NULL;
}

/* After all of that is discarded the secret is nowhere in the process: not in the region, on desks,
 * in LZ4's state, on stacks. */
static void test_secrets_are_nowhere_in_the_process(void **state)
{
	const size_t window_bytes = 1 << 20;
	uint8_t *window = mmap(NULL, window_bytes, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)state;
	assert_true(window != MAP_FAILED);
	if (IS_SANITIZED)
		skip();
	for (uint32_t chunk = 4096; chunk <= 65536; chunk *= 16) {
		int fd = open_memory();
		struct store *store = open_store(fd, NR_PAGES, chunk, 0, 128 * KIB);
		pthread_t thread;

		use_secrets(store);
		assert_int_equal(pthread_create(&thread, NULL, use_secrets, store), 0);
		assert_true(secrets_in_process(window, window_bytes) > 0);
		pthread_join(thread, NULL);
		assert_true(store_discard(store, 0, NR_PAGES) > 0);
		assert_int_equal(secrets_in_process(window, window_bytes), 0);
		store_destroy(store);
		close(fd);
	}
	munmap(window, window_bytes);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_discarded_pages_are_gone),
		cmocka_unit_test(test_overwritten_pages_are_gone),
		cmocka_unit_test(test_punched_bytes_are_gone),
		cmocka_unit_test(test_partial_requests_leave_nothing),
		cmocka_unit_test(test_moved_pages_are_gone),
		cmocka_unit_test(test_refused_pages_are_gone),
		cmocka_unit_test(test_repeated_words_are_gone),
		cmocka_unit_test(test_words_of_the_dead_are_gone),
		cmocka_unit_test(test_secrets_are_nowhere_in_the_process),
		cmocka_unit_test(test_orphans_are_gone_after_rebuild),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
