/* SPDX-License-Identifier: MIT
 *
 * Tests of region.c: layout, reserve, limit, what goes back to the OS, and calls that fail.
 */
#include "region_fixture.h"

/* The file is nameless and ours alone. */
static void test_memory_has_no_name(void **state)
{
	uint32_t flags = ~0U;
	int fd = region_memory(&flags);
	struct stat st;

	(void)state;
	assert_true(fd >= 0);
	assert_true(flags == 0 || flags == REGION_NOSWAP);
	assert_int_equal(fstat(fd, &st), 0);
	assert_int_equal(st.st_nlink, 0);
	assert_int_equal(st.st_size, 0);
	assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	if (flags & REGION_NOSWAP)
		assert_int_equal(st.st_mode & 0777, 0600);
	close(fd);
}

/* Memory comes and goes in single pages, whatever the machine's default is. */
static void test_memory_is_in_small_pages(void **state)
{
	const size_t bytes = 8 * MIB;
	int fd = open_memory();
	struct stat st;
	char *memory;

	(void)state;
	assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	assert_ptr_not_equal(memory, MAP_FAILED);
	memory[4 * MIB] = 1;
	assert_int_equal(fstat(fd, &st), 0);
	assert_int_equal(st.st_blocks * 512, PAGE_BYTES);
	assert_int_equal(pwrite(fd, memory, 4 * MIB, 0), 4 * MIB);
	assert_int_equal(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE_BYTES,
				   4 * MIB - PAGE_BYTES),
			 0);
	assert_int_equal(fstat(fd, &st), 0);
	assert_int_equal(st.st_blocks * 512, 2 * PAGE_BYTES);
	munmap(memory, bytes);
	close(fd);
}

/* Options out of range are refused and the file is left as it was. */
static void test_bad_options_are_refused(void **state)
{
	static const struct store_options bad[] = {
		{.nr_pages = 0, .chunk_bytes = 65536},
		{.nr_pages = STORE_MAX_PAGES + 1ULL, .chunk_bytes = 65536},
		{.nr_pages = UINT64_MAX, .chunk_bytes = 65536},
		{.nr_pages = 1, .chunk_bytes = 0},
		{.nr_pages = 1, .chunk_bytes = 2048},
		{.nr_pages = 1, .chunk_bytes = 4097},
		{.nr_pages = 1, .chunk_bytes = 12288},
		{.nr_pages = 1, .chunk_bytes = 131072},
		{.nr_pages = 1, .chunk_bytes = 65536, .mem_limit = 1},
		{.nr_pages = 1, .chunk_bytes = 65536, .mem_limit = 65535},
	};
	int fd = open_memory();
	struct stat st;

	(void)state;
	assert_int_equal(ftruncate(fd, 12345), 0);
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct store *store = NULL;

		assert_int_equal(region_format(fd, &bad[i]), -EINVAL);
		assert_int_equal(store_create(&store, fd, &bad[i]), -EINVAL);
		assert_null(store);
	}
	assert_int_equal(fstat(fd, &st), 0);
	assert_int_equal(st.st_size, 12345);
	close(fd);
}

/* Tables and chunks lie one behind the other and hold what they must, at any size. */
static void test_layout_holds_the_tables(void **state)
{
	static const uint64_t sizes[] = {1,	2,     511,   512,	513,	   32767,
					 32768, 32769, 65537, 16777216, 1ULL << 28};

	(void)state;
	for (uint32_t chunk = STORE_MIN_CHUNK_BYTES; chunk <= STORE_MAX_CHUNK_BYTES; chunk *= 2) {
		for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
			struct store_options o = {.nr_pages = sizes[i], .chunk_bytes = chunk};
			struct region_geometry h;
			int fd = open_memory();

			assert_int_equal(region_format(fd, &o), 0);
			assert_int_equal(pread(fd, &h, sizeof(h), 0), sizeof(h));
			assert_true(h.map_off >= sizeof(struct region_header));
			assert_true(h.slot_off >= h.map_off + 2 * ((sizes[i] + 32767) / 32768) * 8);
			assert_true(h.word_off >= h.slot_off + sizes[i] * 8);
			assert_true(h.chunk_off >= h.word_off + sizes[i] * 16);
			assert_true(h.arena_off >=
				    h.chunk_off + h.nr_chunks * sizeof(struct chunk));
			assert_true(h.total_bytes == h.arena_off + h.nr_chunks * chunk);
			/* All pages of the file raw, or what a slot can address. */
			assert_true(h.nr_chunks * chunk >= sizes[i] * PAGE_BYTES);
			assert_true(h.nr_chunks * chunk <= 4ULL << SLOT_PLACE_BITS);
			close(fd);
		}
	}
}

/* What is no region, or another version's, is not mapped; an unknown format has its own error. */
static void test_other_files_are_not_mapped(void **state)
{
	struct store_options o = {.nr_pages = 10, .chunk_bytes = 65536};
	struct region_geometry good[2], h[2];
	struct region *region = NULL;
	struct store *store = NULL;
	int fd = open_memory();

	(void)state;
	assert_int_equal(region_map(&region, fd), -EINVAL);
	assert_int_equal(region_format(fd, &o), 0);
	assert_int_equal(pread(fd, good, sizeof(good), 0), sizeof(good));

	memcpy(h, good, sizeof(h));
	h[0].magic[3] ^= 1;
	h[1].magic[3] ^= 1;
	assert_int_equal(pwrite(fd, h, sizeof(h), 0), sizeof(h));
	assert_int_equal(region_map(&region, fd), -EINVAL);
	memcpy(h, good, sizeof(h));
	h[0].format = h[1].format = REGION_FORMAT + 1;
	assert_int_equal(pwrite(fd, h, sizeof(h), 0), sizeof(h));
	assert_int_equal(region_map(&region, fd), -EPROTONOSUPPORT);
	assert_int_equal(store_adopt(&store, fd), -EPROTONOSUPPORT);
	assert_int_equal(pwrite(fd, good, sizeof(good), 0), sizeof(good));
	assert_int_equal(ftruncate(fd, (off_t)good->total_bytes - 1), 0);
	assert_int_equal(region_map(&region, fd), -EINVAL);
	for (off_t end = 0; end < (off_t)sizeof(good); end++) {
		assert_int_equal(ftruncate(fd, end), 0);
		assert_int_equal(region_map(&region, fd), -EINVAL);
	}
	assert_null(region);
	close(fd);
	assert_true(region_map(&region, -1) < 0);
}

/* An empty region of 64 GiB is there at once and costs what one of 4 MiB does. */
static void test_large_region_costs_nothing(void **state)
{
	struct fixture small, large;
	uint64_t began, took;

	(void)state;
	open_region(&small, 1024, CHUNK, 0, MIB);
	began = now_ns();
	open_region(&large, 64 * GIB / PAGE_BYTES, CHUNK, 0, MIB);
	took = now_ns() - began;
	await_ready(small.region, MIB / CHUNK);
	await_ready(large.region, MIB / CHUNK);
	assert_that(took < 100000000, "took %llu us", (unsigned long long)took / 1000);
	assert_true(resident(&large) <= resident(&small) + PAGE_BYTES);
	close_region(&small);
	close_region(&large);
}

/* The keeper populates the reserve, no more, and the OS agrees. */
static void test_reserve_is_populated_ahead(void **state)
{
	uint64_t arena, tables, reserve;
	struct fixture f;

	(void)state;
	open_region(&f, 100000, CHUNK, 0, 20 * CHUNK);
	await_ready(f.region, 20);
	usleep(20000);
	region_usage(f.region, &arena, &tables, &reserve);
	assert_int_equal(reserve, 20 * CHUNK);
	assert_int_equal(arena, 0);
	assert_int_equal(resident(&f), tables + reserve);
	close_region(&f);
}

/* Chunks come zeroed and different from each other; what is above the reserve goes back. */
static void test_surplus_goes_back(void **state)
{
	uint64_t arena, tables, reserve;
	bool seen[256] = {false};
	struct fixture f;
	uint32_t chunks[100];

	(void)state;
	open_region(&f, 100000, CHUNK, 0, 4 * CHUNK);
	for (int round = 0; round < 3; round++) {
		for (int i = 0; i < 100; i++) {
			chunks[i] = take(f.region);
			assert_true(chunks[i] < 256);
			assert_false(seen[chunks[i]]);
			seen[chunks[i]] = true;
			use(f.region, chunks[i]);
		}
		region_usage(f.region, &arena, &tables, &reserve);
		assert_int_equal(arena, 100 * CHUNK);
		for (int i = 0; i < 100; i++) {
			give(f.region, chunks[(i * 37) % 100]);
			seen[chunks[(i * 37) % 100]] = false;
		}
		region_settle(f.region);
		region_usage(f.region, &arena, &tables, &reserve);
		assert_int_equal(arena, 0);
		assert_int_equal(reserve, 4 * CHUNK);
	}
	close_region(&f);
}

/* Bursts far above the reserve are served, by waiting. */
static void test_exhausted_reserve_is_refilled(void **state)
{
	struct fixture f;
	uint32_t chunks[300];

	(void)state;
	open_region(&f, 100000, CHUNK, 0, CHUNK);
	for (int i = 0; i < 300; i++)
		use(f.region, chunks[i] = take(f.region));
	for (int i = 0; i < 300; i++)
		give(f.region, chunks[i]);
	region_settle(f.region);
	await_ready(f.region, 1);
	close_region(&f);
}

/* The chunk table's next page is there before the first of its chunks is touched, and no other. */
static void test_chunk_table_is_populated_ahead(void **state)
{
	const uint32_t each = PAGE_BYTES / sizeof(struct chunk);
	struct region *region;
	struct fixture f;

	(void)state;
	region = open_region(&f, 1000000, CHUNK, 0, 4 * CHUNK);
	for (uint32_t page = 1; page < 4; page++) {
		off_t next = (off_t)(region->geometry.chunk_off + page * PAGE_BYTES);

		while (region_nr_touched(region) < page * each) {
			if (region_nr_touched(region) < page * each - each / 2)
				assert_int_not_equal(lseek(f.fd, next, SEEK_DATA), next);
			take(region);
			region_replenish(region);
		}
		assert_int_equal(region_nr_touched(region), page * each);
		assert_int_equal(lseek(f.fd, next, SEEK_DATA), next);
	}
	close_region(&f);
}

/* The limit holds for chunks in use and the reserve together; the spare is compaction's. */
static void test_limit_covers_the_reserve(void **state)
{
	struct fixture f;
	uint32_t chunks[64], nr = 0, c;
	int rv;

	(void)state;
	open_region(&f, 100000, CHUNK, 64 * CHUNK, 16 * CHUNK);
	for (;; nr++) {
		uint64_t arena, tables, reserve;

		rv = region_take_chunk(f.region, false, &chunks[nr]);
		if (rv == -EAGAIN && !wait_ready(f.region, false))
			rv = region_take_chunk(f.region, false, &chunks[nr]);
		if (rv)
			break;
		usleep(500);
		region_usage(f.region, &arena, &tables, &reserve);
		assert_true(arena + reserve <= 64 * CHUNK);
	}
	assert_int_equal(rv, -ENOSPC);
	assert_int_equal(nr, 64 - 8);
	await_ready(f.region, 6);
	while ((rv = region_take_chunk(f.region, true, &c)) == 0)
		chunks[nr++] = c;
	assert_in_range(nr, 56 + 3, 64);
	assert_int_equal(region_take_chunk(f.region, false, &c), -ENOSPC);
	while (nr)
		give(f.region, chunks[--nr]);
	region_settle(f.region);
	assert_int_equal(take(f.region) < 64, 1);
	close_region(&f);
}

/* A limit of one chunk is a region of one chunk, again and again. */
static void test_one_chunk_is_enough(void **state)
{
	struct fixture f;
	uint32_t c;

	(void)state;
	open_region(&f, 1, CHUNK, CHUNK, 4 * MIB);
	for (int i = 0; i < 200; i++) {
		uint32_t mine = take(f.region);

		assert_int_equal(region_take_chunk(f.region, false, &c), -ENOSPC);
		assert_int_equal(region_take_chunk(f.region, true, &c), -ENOSPC);
		give(f.region, mine);
		if (i % 3 == 0)
			region_settle(f.region);
	}
	close_region(&f);
}

/* A chunk that lost OS pages can be had again at once, populated, and within the limit. */
static void test_punched_chunk_comes_back(void **state)
{
	struct fixture f;

	(void)state;
	open_region(&f, 1, CHUNK, CHUNK, CHUNK);
	for (int i = 0; i < 300; i++) {
		uint32_t c = take(f.region);

		assert_int_equal(region_punch(f.region, 2 * PAGE_BYTES, 3 * PAGE_BYTES), 0);
		f.region->chunks[c].punched = 3;
		region_give_punched(f.region, c);
	}
	close_region(&f);
}

/* The Nth populate fails, for each N: nothing is lost, nothing is counted twice. */
static void test_each_failed_populate_is_survived(void **state)
{
	(void)state;
	for (int n = 0; n < 24; n++) {
		uint64_t arena, tables, reserve;
		uint32_t chunks[60], nr = 0;
		struct fixture f;

		seam_set(&populate_seam, n, 2, n % 2 ? ENOMEM : ENOSPC);
		open_region(&f, 100000, CHUNK, 0, 3 * CHUNK);
		for (int tries = 0; nr < 60; tries++) {
			int rv = region_take_chunk(f.region, false, &chunks[nr]);

			assert_true(tries < 1000);
			if (rv == -EAGAIN)
				wait_ready(f.region, false);
			else if (!rv)
				use(f.region, chunks[nr++]);
		}
		region_settle(f.region);
		region_usage(f.region, &arena, &tables, &reserve);
		assert_int_equal(arena, 60 * CHUNK);
		while (nr)
			give(f.region, chunks[--nr]);
		region_settle(f.region);
		region_usage(f.region, &arena, &tables, &reserve);
		assert_int_equal(arena, 0);
		close_region(&f);
	}
}

/* A call that a signal interrupted is made again. */
static void test_interrupted_calls_are_repeated(void **state)
{
	uint64_t arena, tables, reserve;
	uint32_t chunks[8];
	struct fixture f;

	(void)state;
	open_region(&f, 100000, CHUNK, 0, CHUNK);
	seam_set(&populate_seam, 0, 5, EINTR);
	for (int i = 0; i < 8; i++)
		chunks[i] = take(f.region);
	seam_set(&punch_seam, 0, 5, EINTR);
	for (int i = 0; i < 8; i++)
		give(f.region, chunks[i]);
	region_settle(f.region);
	region_usage(f.region, &arena, &tables, &reserve);
	assert_int_equal(arena, 0);
	close_region(&f);
}

/* Kernels without MADV_POPULATE_WRITE: chunks are touched instead. */
static void test_without_populate_advice(void **state)
{
	struct fixture f;

	(void)state;
	seam_set(&advise_seam, 0, 1 << 30, EINVAL);
	open_region(&f, 100000, CHUNK, 0, 2 * CHUNK);
	for (int i = 0; i < 20; i++)
		use(f.region, take(f.region));
	assert_true(advise_seam.calls > 0);
	close_region(&f);
}

/* Memory that the OS does not take back stays ours: counted, zero, and used again. */
static void test_failed_punch_keeps_the_limit(void **state)
{
	struct fixture f;
	uint32_t chunks[28];

	(void)state;
	open_region(&f, 100000, CHUNK, 32 * CHUNK, 2 * CHUNK);
	for (int round = 0; round < 20; round++) {
		uint64_t arena, tables, reserve;

		for (int i = 0; i < 28; i++) {
			chunks[i] = take(f.region);
			use(f.region, chunks[i]);
			region_usage(f.region, &arena, &tables, &reserve);
			assert_that(arena + reserve <= 32 * CHUNK, "round %d: %llu chunks", round,
				    (unsigned long long)((arena + reserve) / CHUNK));
		}
		seam_set(&punch_seam, round % 3, 2, ENOMEM);
		for (int i = 0; i < 28; i++)
			give(f.region, chunks[i * 5 % 28]);
		region_settle(f.region);
		seam_reset();
	}
	close_region(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_memory_has_no_name),
		cmocka_unit_test(test_memory_is_in_small_pages),
		cmocka_unit_test(test_bad_options_are_refused),
		cmocka_unit_test(test_layout_holds_the_tables),
		cmocka_unit_test(test_other_files_are_not_mapped),
		cmocka_unit_test(test_large_region_costs_nothing),
		cmocka_unit_test(test_reserve_is_populated_ahead),
		cmocka_unit_test(test_surplus_goes_back),
		cmocka_unit_test(test_exhausted_reserve_is_refilled),
		cmocka_unit_test(test_chunk_table_is_populated_ahead),
		cmocka_unit_test(test_limit_covers_the_reserve),
		cmocka_unit_test(test_one_chunk_is_enough),
		cmocka_unit_test(test_punched_chunk_comes_back),
		cmocka_unit_test(test_each_failed_populate_is_survived),
		cmocka_unit_test(test_interrupted_calls_are_repeated),
		cmocka_unit_test(test_without_populate_advice),
		cmocka_unit_test(test_failed_punch_keeps_the_limit),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
