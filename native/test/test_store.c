/* SPDX-License-Identifier: MIT
 *
 * Tests of the store's calls: ranges, kinds of pages, the limit, what is counted, what it costs.
 */
#include "fixture.h"

#include <poll.h>
#include <sys/eventfd.h>

static const uint32_t chunk_sizes[] = {4096, 16384, 65536};

static uint8_t buffer[64 * PAGE_BYTES];

/* Every kind of page after every other, in one slot; the word of the second survives a rebuild. */
static void test_any_kind_of_page_follows_any_other(void **state)
{
	(void)state;
	for (size_t c = 0; c < ARRAY_SIZE(chunk_sizes); c++) {
		int fd = open_memory();
		struct store *store = open_store(fd, 3, chunk_sizes[c], 0, 0);
		uint8_t want[PAGE_BYTES];

		for (int i = 0; i < 3 * NR_PAGE_KINDS * NR_PAGE_KINDS; i++) {
			make_page(want, (enum page_kind)(i % NR_PAGE_KINDS), (uint64_t)i);
			assert_int_equal(store_write(store, 1, 1, want), 1);
			make_page(want, (enum page_kind)(i / NR_PAGE_KINDS % NR_PAGE_KINDS),
				  1000 + (uint64_t)i);
			assert_int_equal(store_write(store, 1, 1, want), 1);
			assert_int_equal(store_read(store, 1, 1, buffer), 1);
			assert_memory_equal(buffer, want, PAGE_BYTES);
			assert_sound(store);
			if (i % 5 == 0)
				assert_int_equal(store_rebuild(store), 0);
			if (i % 7 == 0)
				assert_int_equal(store_discard(store, 1, 1), 1);
		}
		store_destroy(store);
		close(fd);
	}
}

/* Words that just fit in a slot, and those that just do not, one after another. */
static void test_repeated_words_of_any_width(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 600, 65536, 0, 0);
	uint64_t words[66 * 3];
	uint32_t nr = 0;

	(void)state;
	for (int bit = 0; bit < 64; bit++) {
		words[nr++] = 1ULL << bit;
		words[nr++] = (1ULL << bit) - 1;
		words[nr++] = ~(1ULL << bit);
	}
	for (uint32_t shift = 0; shift < 4; shift++) {
		for (uint32_t i = 0; i < nr; i++) {
			fill_word(buffer, words[(i + shift * 37) % nr]);
			assert_int_equal(store_write(store, 400 + i, 1, buffer), 1);
		}
		assert_sound(store);
		for (uint32_t i = 0; i < nr; i++) {
			uint8_t want[PAGE_BYTES], word[PAGE_BYTES];
			uint32_t kind;

			fill_word(want, words[(i + shift * 37) % nr]);
			assert_int_equal(store_read(store, 400 + i, 1, buffer), 1);
			assert_memory_equal(buffer, want, PAGE_BYTES);
			assert_int_equal(store_stored(store, 400 + i, word, &kind), 8);
			assert_int_equal(kind, SLOT_SAME);
			assert_memory_equal(word, want, 8);
		}
	}
	assert_int_equal(stats_of(store).same_pages, nr);
	assert_int_equal(stats_of(store).mem_used_bytes, 0);
	store_destroy(store);
	close(fd);
}

/* Ranges outside the file are refused, counted once each, and change nothing. */
static void test_ranges_outside_the_file_are_refused(void **state)
{
	static const uint64_t bad[][2] = {
		{0, 0},
		{5, 0},
		{10, 0},
		{10, 1},
		{0, 11},
		{9, 2},
		{11, 1},
		{UINT64_MAX, 1},
		{UINT64_MAX, 2},
		{1, UINT64_MAX},
		{0, UINT64_MAX},
		{UINT64_MAX, UINT64_MAX},
		{5, 1ULL << 52},
		{1ULL << 52, 5},
		{1ULL << 63, 1ULL << 63},
		{9, UINT64_MAX - 8},
	};
	int fd = open_memory();
	struct store *store = open_store(fd, 10, 65536, 0, 0);
	struct store_stats s;
	uint32_t kind;

	(void)state;
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		assert_int_equal(store_write(store, bad[i][0], bad[i][1], buffer), -EINVAL);
		assert_int_equal(store_read(store, bad[i][0], bad[i][1], buffer), -EINVAL);
		assert_int_equal(store_discard(store, bad[i][0], bad[i][1]), -EINVAL);
	}
	assert_int_equal(store_stored(store, 10, buffer, &kind), -EINVAL);
	assert_int_equal(store_stored(store, UINT64_MAX, buffer, &kind), -EINVAL);
	s = stats_of(store);
	assert_int_equal(s.invalid_io, 3 * ARRAY_SIZE(bad));
	assert_int_equal(s.reads + s.writes + s.discards, 0);
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

/* Offsets and lengths at every edge there is: of pages, of the file, of 63 and 64 bits. */
static void test_byte_ranges_at_the_edges(void **state)
{
	static const uint64_t huge[] = {1ULL << 63, (1ULL << 63) - 1, UINT64_MAX, UINT64_MAX - 1,
					(1ULL << 63) + 1};
	const uint64_t size = 5 * PAGE_BYTES;
	int fd = open_memory();
	struct store *store = open_store(fd, 5, 65536, 0, 0);

	(void)state;
	memset(buffer, 7, size);
	assert_int_equal(store_pwrite(store, 0, size, buffer), size);
	for (size_t i = 0; i < ARRAY_SIZE(huge); i++) {
		uint64_t off = huge[i];
		bool valid = off < 1ULL << 63;

		assert_int_equal(store_pread(store, off, 0, buffer), valid ? 0 : -EINVAL);
		assert_int_equal(store_pread(store, off, 1, buffer), -EINVAL);
		assert_int_equal(store_pread(store, 1, off, buffer), -EINVAL);
		assert_int_equal(store_pread(store, off, off, buffer), -EINVAL);
		assert_int_equal(store_pwrite(store, off, 1, buffer), -EFBIG);
		assert_int_equal(store_pwrite(store, 1, off, buffer), -EFBIG);
		assert_int_equal(store_pwrite(store, off, off, buffer), -EFBIG);
		assert_int_equal(store_punch(store, off, 1), -EINVAL);
		assert_int_equal(store_punch(store, off, off), -EINVAL);
		assert_int_equal(store_punch(store, off, 0), -EINVAL);
	}
	assert_int_equal(store_punch(store, 0, 0), -EINVAL);
	assert_int_equal(store_punch(store, size, 1), 0);
	assert_int_equal(store_punch(store, size, (1ULL << 63) - 1 - size), 0);
	assert_int_equal(store_pread(store, size, 1, buffer), 0);
	assert_int_equal(store_pread(store, size + 12345, 1, buffer), 0);
	assert_int_equal(store_pread(store, size - 1, 100, buffer), 1);
	assert_int_equal(store_pread(store, 0, 0, buffer), 0);
	assert_int_equal(store_pwrite(store, size, 0, buffer), 0);
	assert_int_equal(store_pwrite(store, size, 1, buffer), -EFBIG);
	assert_int_equal(store_pwrite(store, size - 1, 2, buffer), -EFBIG);
	assert_int_equal(store_pwrite(store, 0, size + 1, buffer), -EFBIG);
	assert_int_equal(store_pread(store, 1, (1ULL << 63) - 2, buffer), size - 1);
	assert_int_equal(store_pread(store, 0, size + 1000, buffer), size);
	for (uint64_t i = 0; i < size; i++)
		assert_int_equal(buffer[i], 7);
	assert_int_equal(store_punch(store, size - 1, (1ULL << 63) - 1 - size), 0);
	assert_int_equal(store_pread(store, size - 2, 2, buffer), 2);
	assert_int_equal(buffer[0], 7);
	assert_int_equal(buffer[1], 0);
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

/* All beginnings and ends in three pages, in steps that hit and miss the pages' edges. */
static void test_partial_heads_and_tails(void **state)
{
	static const uint32_t at[] = {0, 1, 4095, 4096, 4097, 6000, 8191, 8192, 8193, 12287, 12288};
	static uint8_t want[3 * PAGE_BYTES], piece[3 * PAGE_BYTES];
	int fd = open_memory();
	struct store *store = open_store(fd, 3, 65536, 0, 0);
	uint64_t seed = 8;

	(void)state;
	for (size_t a = 0; a < ARRAY_SIZE(at); a++) {
		for (size_t b = a; b < ARRAY_SIZE(at); b++) {
			uint32_t length = at[b] - at[a];

			for (int i = 0; i < 3; i++)
				make_page(want + i * PAGE_BYTES,
					  (enum page_kind)((a + b + (size_t)i) % NR_PAGE_KINDS),
					  next_random(&seed));
			assert_int_equal(store_write(store, 0, 3, want), 3);
			fill_random(piece, length, &seed);
			assert_int_equal(store_pwrite(store, at[a], length, piece), length);
			memcpy(want + at[a], piece, length);
			assert_int_equal(store_pread(store, at[a], length, buffer), length);
			assert_memory_equal(buffer, piece, length);
			assert_int_equal(store_read(store, 0, 3, buffer), 3);
			assert_memory_equal(buffer, want, sizeof(want));
			if (!length)
				continue;
			assert_int_equal(store_punch(store, at[a], length), 0);
			memset(want + at[a], 0, length);
			assert_int_equal(store_read(store, 0, 3, buffer), 3);
			assert_memory_equal(buffer, want, sizeof(want));
			assert_sound(store);
		}
	}
	store_destroy(store);
	close(fd);
}

/* Punching parts of pages that hold nothing stores nothing. */
static void test_punching_empty_pages_stores_nothing(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 2000, 65536, 0, 0);
	struct store_stats s;

	(void)state;
	memset(buffer, 1, PAGE_BYTES);
	assert_int_equal(store_write(store, 3, 1, buffer), 1);
	assert_int_equal(store_punch(store, PAGE_BYTES / 2, PAGE_BYTES), 0);
	assert_int_equal(store_punch(store, 1000 * PAGE_BYTES + 1, 3 * PAGE_BYTES), 0);
	s = stats_of(store);
	assert_int_equal(s.pages_stored + s.same_pages, 1);
	store_destroy(store);
	close(fd);
}

/* Counters say what was done: pages of valid requests, kinds of pages held now. */
static void test_counters_add_up(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 2000, 65536, 0, 0);
	struct store_stats s;

	(void)state;
	for (uint64_t i = 0; i < 40; i++)
		make_page(buffer + i * PAGE_BYTES,
			  i < 10   ? PAGE_RANDOM
			  : i < 30 ? PAGE_SPARSE
				   : PAGE_WORD_64,
			  i);
	assert_int_equal(store_write(store, 500, 40, buffer), 40);
	assert_int_equal(store_read(store, 490, 20, buffer), 20);
	assert_int_equal(store_pread(store, 510 * PAGE_BYTES + 5, PAGE_BYTES, buffer), PAGE_BYTES);
	s = stats_of(store);
	assert_int_equal(s.writes, 40);
	assert_int_equal(s.reads, 22);
	assert_int_equal(s.pages_stored, 30);
	assert_int_equal(s.same_pages, 10);
	assert_int_equal(s.raw_pages, 10);
	assert_int_equal(s.good_pages, 20);
	assert_true(s.compr_bytes > 10 * PAGE_BYTES && s.compr_bytes < 12 * PAGE_BYTES);
	assert_int_equal(store_discard(store, 0, 2000), 40);
	assert_int_equal(store_discard(store, 0, 2000), 0);
	s = stats_of(store);
	assert_int_equal(s.discards, 4000);
	assert_int_equal(s.notify_free, 40);
	assert_int_equal(s.pages_stored + s.same_pages + s.raw_pages + s.good_pages, 0);
	assert_int_equal(s.failed_reads + s.failed_writes + s.invalid_io, 0);
	assert_true(s.mem_max_bytes >= 65536);
	store_destroy(store);
	close(fd);
}

/* MemUsed is what the OS says, and equals the chunks in use. */
static void test_memory_used_is_what_chunks_occupy(void **state)
{
	(void)state;
	for (size_t c = 0; c < ARRAY_SIZE(chunk_sizes); c++) {
		int fd = open_memory();
		struct store *store = open_store(fd, 5000, chunk_sizes[c], 0, 256 * KIB);
		uint64_t seed = 3;

		for (int i = 0; i < 3000; i++) {
			uint64_t index = random_below(&seed, 5000);

			make_page(buffer, (enum page_kind)random_below(&seed, NR_PAGE_KINDS),
				  next_random(&seed));
			assert_int_equal(store_write(store, index, 1, buffer), 1);
			if (i % 500 == 499) {
				struct store_stats s;

				store_discard(store, random_below(&seed, 4000), 1000);
				region_settle(store->region);
				s = stats_of(store);
				assert_int_equal(s.mem_used_bytes, s.nr_chunks * chunk_sizes[c]);
				assert_true(s.mem_max_bytes >= s.mem_used_bytes);
				assert_true(s.reserve_bytes <= 256 * KIB);
			}
		}
		store_destroy(store);
		close(fd);
	}
}

/* 64 GiB with pages here and there: tables cost two OS pages for each place, not 384 MiB. */
static void test_scattered_pages_of_a_large_file_cost_little(void **state)
{
	const uint64_t nr_pages = 64 * GIB / PAGE_BYTES;
	int fd = open_memory();
	uint64_t began = now_ns(), empty;
	struct store *store = open_store(fd, nr_pages, 65536, 0, 256 * KIB);
	uint8_t want[PAGE_BYTES];

	(void)state;
	assert_that(now_ns() - began < 100000000, "creating took %llu us",
		    (unsigned long long)(now_ns() - began) / 1000);
	empty = stats_of(store).table_bytes;
	assert_true(empty < 32 * KIB);
	for (uint64_t i = 0; i < 100; i++) {
		make_page(want, PAGE_SPARSE, i);
		assert_int_equal(store_write(store, i * (nr_pages / 100) + i, 1, want), 1);
	}
	make_page(want, PAGE_WORD_64, 1);
	assert_int_equal(store_write(store, nr_pages - 1, 1, want), 1);
	assert_true(stats_of(store).table_bytes < empty + 110 * PAGE_BYTES);
	assert_sound(store);
	assert_int_equal(store_rebuild(store), 0);
	assert_int_equal(store_read(store, nr_pages - 1, 1, buffer), 1);
	assert_memory_equal(buffer, want, PAGE_BYTES);
	assert_int_equal(store_discard(store, 0, nr_pages), 101);
	assert_true(stats_of(store).table_bytes < empty + 110 * PAGE_BYTES);
	store_destroy(store);
	close(fd);
}

/* The largest file there can be: its last page works, its range ends where it should. */
static void test_largest_file(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, STORE_MAX_PAGES, 65536, MIB, 0);
	const uint64_t size = (uint64_t)STORE_MAX_PAGES * PAGE_BYTES;

	(void)state;
	memset(buffer, 0, PAGE_BYTES);
	strcpy((char *)buffer, "the last page");
	assert_int_equal(store_write(store, STORE_MAX_PAGES - 1, 1, buffer), 1);
	assert_int_equal(store_write(store, STORE_MAX_PAGES, 1, buffer), -EINVAL);
	assert_int_equal(store_pread(store, size - PAGE_BYTES, PAGE_BYTES + 5, buffer + PAGE_BYTES),
			 PAGE_BYTES);
	assert_memory_equal(buffer, buffer + PAGE_BYTES, PAGE_BYTES);
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

/* Reading, discarding and punching what was never written allocates nothing. */
static void test_untouched_pages_cost_nothing(void **state)
{
	const uint64_t nr_pages = 16 * GIB / PAGE_BYTES;
	int fd = open_memory();
	struct store *store = open_store(fd, nr_pages, 65536, 0, 0);
	uint64_t before, seed = 2;
	uint32_t kind;

	(void)state;
	assert_int_equal(store_read(store, 0, 1, buffer), 1);
	assert_int_equal(wait_ready(store->region, false), 0);
	before = stats_of(store).table_bytes;
	for (int i = 0; i < 3000; i++) {
		uint64_t index = random_below(&seed, nr_pages - 64);

		assert_int_equal(store_read(store, index, 20, buffer), 20);
		assert_int_equal(store_pread(store, index * PAGE_BYTES + 7, 9000, buffer), 9000);
		assert_int_equal(store_discard(store, index, 64), 0);
		assert_int_equal(store_punch(store, index * PAGE_BYTES + 99, 50000), 0);
		assert_int_equal(store_stored(store, index, buffer, &kind), 0);
		assert_int_equal(kind, SLOT_EMPTY);
	}
	assert_int_equal(stats_of(store).table_bytes, before);
	store_destroy(store);
	close(fd);
}

/* Pages that nothing compresses, until the limit: refused pages keep their content, all others
 * stay readable; what is discarded makes room again. */
static void test_full_store_loses_nothing(void **state)
{
	(void)state;
	for (size_t c = 0; c < ARRAY_SIZE(chunk_sizes); c++) {
		const uint64_t limit = 2 * MIB;
		int fd = open_memory();
		struct store *store = open_store(fd, 1000, chunk_sizes[c], limit, 256 * KIB);
		uint8_t want[PAGE_BYTES];
		struct store_stats s;
		uint64_t held = 0;

		for (uint64_t i = 0; i < 1000; i++) {
			make_page(want, PAGE_RANDOM, i);
			if (store_write(store, i, 1, want) == 1)
				held = i + 1;
			else
				assert_int_equal(store_write(store, i, 1, want), -ENOSPC);
		}
		s = stats_of(store);
		assert_true(held * PAGE_BYTES > limit * 2 / 3 && held < 512);
		assert_true(s.mem_used_bytes + s.reserve_bytes <= limit);
		assert_int_equal(s.failed_writes, 2 * (1000 - held));
		/* Overwriting needs room for the new page beside the old one. */
		make_page(want, PAGE_RANDOM, 5000);
		assert_int_equal(store_write(store, 0, 1, want), -ENOSPC);
		assert_int_equal(store_pwrite(store, 1, 5, want), -ENOSPC);
		assert_int_equal(store_punch(store, 7, 100), -ENOSPC);
		for (uint64_t i = 0; i < 1000; i++) {
			make_page(want, i < held ? PAGE_RANDOM : PAGE_ZERO, i);
			assert_int_equal(store_read(store, i, 1, buffer), 1);
			assert_memory_equal(buffer, want, PAGE_BYTES);
		}
		assert_sound(store);
		/* Same-filled pages need no room. */
		make_page(want, PAGE_WORD_64, 1);
		assert_int_equal(store_write(store, 1, 1, want), 1);
		assert_int_equal(store_write(store, 999, 1, want), 1);
		for (int round = 0; round < 20; round++) {
			assert_true(store_discard(store, 100, 64) >= 16);
			for (uint64_t i = 0; i < 64; i++)
				make_page(buffer + i * PAGE_BYTES, PAGE_RANDOM, 9000 + i);
			assert_true(store_write(store, 100, 64, buffer) >= 16);
			assert_sound(store);
			s = stats_of(store);
			assert_true(s.mem_used_bytes + s.reserve_bytes <= limit);
		}
		store_destroy(store);
		close(fd);
	}
}

/* A request that does not fit stores its first pages and says how many. */
static void test_request_ends_short_at_the_limit(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 100, 65536, 128 * KIB, 64 * KIB);
	uint8_t want[PAGE_BYTES];
	int64_t stored;

	(void)state;
	for (uint64_t i = 0; i < 60; i++)
		make_page(buffer + i * PAGE_BYTES, PAGE_RANDOM, i);
	stored = store_write(store, 10, 60, buffer);
	assert_int_equal(stored, 30);
	assert_int_equal(store_pwrite(store, 80 * PAGE_BYTES, 3 * PAGE_BYTES, buffer), -ENOSPC);
	for (uint64_t i = 0; i < 90; i++) {
		bool held = i >= 10 && i < 40;

		make_page(want, held ? PAGE_RANDOM : PAGE_ZERO, i - 10);
		assert_int_equal(store_read(store, i, 1, buffer), 1);
		assert_memory_equal(buffer, want, PAGE_BYTES);
	}
	assert_int_equal(stats_of(store).failed_writes, 33);
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

/* A burst far beyond the reserve waits for the keeper; nothing is refused. */
static void test_burst_beyond_the_reserve(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 4096, 65536, 0, 64 * KIB);
	uint8_t want[PAGE_BYTES];

	(void)state;
	for (uint64_t at = 0; at < 4096; at += 64) {
		for (uint64_t i = 0; i < 64; i++)
			make_page(buffer + i * PAGE_BYTES, PAGE_RANDOM, at + i);
		assert_int_equal(store_write(store, at, 64, buffer), 64);
	}
	for (uint64_t i = 0; i < 4096; i += 11) {
		make_page(want, PAGE_RANDOM, i);
		assert_int_equal(store_read(store, i, 1, buffer), 1);
		assert_memory_equal(buffer, want, PAGE_BYTES);
	}
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

/* A write right after a discard that emptied everything finds room, however small the limit. */
static void test_freed_room_is_there_at_once(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 64, 65536, 64 * KIB, 64 * KIB);

	(void)state;
	for (int round = 0; round < 300; round++) {
		for (uint64_t i = 0; i < 15; i++)
			make_page(buffer + i * PAGE_BYTES, PAGE_RANDOM, i);
		assert_int_equal(store_write(store, 0, 15, buffer), 15);
		assert_int_equal(store_discard(store, 1, 14), 14);
		store_compact(store, UINT64_MAX);
		assert_int_equal(store_discard(store, 0, 1), 1);
	}
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

/* The watcher is told once, when that much was freed, and not before. */
static void test_watcher_is_told_once(void **state)
{
	int fd = open_memory(), event = eventfd(0, EFD_NONBLOCK);
	struct store *store = open_store(fd, 100, 65536, 0, 0);
	eventfd_t value;

	(void)state;
	for (uint64_t i = 0; i < 50; i++)
		make_page(buffer + i * PAGE_BYTES, PAGE_RANDOM, i);
	assert_int_equal(store_write(store, 0, 50, buffer), 50);
	store_watch(store, event, 10 * PAGE_BYTES);
	store_discard(store, 0, 9);
	assert_int_equal(eventfd_read(event, &value), -1);
	store_discard(store, 9, 5);
	assert_int_equal(eventfd_read(event, &value), 0);
	assert_int_equal(value, 1);
	store_discard(store, 14, 20);
	assert_int_equal(eventfd_read(event, &value), -1);
	store_watch(store, event, PAGE_BYTES);
	store_watch(store, -1, 0);
	store_discard(store, 34, 10);
	assert_int_equal(eventfd_read(event, &value), -1);
	store_watch(store, event, 1);
	assert_int_equal(store_write(store, 44, 3, buffer), 3); /* overwriting frees, too */
	assert_int_equal(eventfd_read(event, &value), 0);
	store_destroy(store);
	close(event);
	close(fd);
}

/* What another decoder needs: state and stored form of each kind of page. */
static void test_stored_forms_are_given_out(void **state)
{
	static const uint32_t states[NR_PAGE_KINDS] = {
		[PAGE_ZERO] = SLOT_SAME,     [PAGE_WORD_50] = SLOT_SAME,
		[PAGE_WORD_64] = SLOT_SAME,  [PAGE_ALMOST_SAME] = SLOT_LZ4,
		[PAGE_SPARSE] = SLOT_LZ4,    [PAGE_TEXT] = SLOT_LZ4,
		[PAGE_THRESHOLD] = SLOT_RAW, [PAGE_RANDOM] = SLOT_RAW,
	};
	uint8_t want[PAGE_BYTES], page[PAGE_BYTES];
	int fd = open_memory();
	struct store *store = open_store(fd, 10, 65536, 0, 0);
	uint32_t kind;

	(void)state;
	for (int k = 0; k < NR_PAGE_KINDS; k++) {
		int64_t length;

		make_page(want, (enum page_kind)k, 3);
		assert_int_equal(store_write(store, 2, 1, want), 1);
		length = store_stored(store, 2, buffer, &kind);
		if (k != PAGE_THRESHOLD)
			assert_int_equal(kind, states[k]);
		if (kind == SLOT_LZ4)
			assert_int_equal(codec_decompress(buffer, (uint32_t)length, page), 0);
		else if (kind == SLOT_RAW)
			memcpy(page, buffer, (size_t)length);
		else
			fill_word(page, *(uint64_t *)buffer);
		assert_memory_equal(page, want, PAGE_BYTES);
	}
	assert_int_equal(store_stored(store, 3, buffer, &kind), 0);
	assert_int_equal(kind, SLOT_EMPTY);
	store_destroy(store);
	close(fd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_any_kind_of_page_follows_any_other),
		cmocka_unit_test(test_repeated_words_of_any_width),
		cmocka_unit_test(test_ranges_outside_the_file_are_refused),
		cmocka_unit_test(test_byte_ranges_at_the_edges),
		cmocka_unit_test(test_partial_heads_and_tails),
		cmocka_unit_test(test_punching_empty_pages_stores_nothing),
		cmocka_unit_test(test_counters_add_up),
		cmocka_unit_test(test_memory_used_is_what_chunks_occupy),
		cmocka_unit_test(test_scattered_pages_of_a_large_file_cost_little),
		cmocka_unit_test(test_largest_file),
		cmocka_unit_test(test_untouched_pages_cost_nothing),
		cmocka_unit_test(test_full_store_loses_nothing),
		cmocka_unit_test(test_request_ends_short_at_the_limit),
		cmocka_unit_test(test_burst_beyond_the_reserve),
		cmocka_unit_test(test_freed_room_is_there_at_once),
		cmocka_unit_test(test_watcher_is_told_once),
		cmocka_unit_test(test_stored_forms_are_given_out),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
