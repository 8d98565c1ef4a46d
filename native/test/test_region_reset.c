/* SPDX-License-Identifier: MIT
 *
 * What becomes of a dead process's chunks.
 */
#include "region_fixture.h"

/* Chunks that a dead process was filling hold no content when they are had again, even where the
 * OS does not take them back. */
static void reset_forgets_unused_chunks(bool punch_fails)
{
	struct fixture f;
	struct region *again;
	uint32_t keep[8];
	uint32_t nr_chunks;

	open_region(&f, 100000, CHUNK, 0, 4 * CHUNK);
	for (int i = 0; i < 16; i++) {
		uint32_t c = take(f.region);

		use(f.region, c);
		if (i % 2)
			keep[i / 2] = c;
		else
			f.region->chunks[c].state = CHUNK_HOLE; /* as rebuild does */
	}
	nr_chunks = region_nr_touched(f.region);
	region_destroy(f.region);
	assert_int_equal(region_map(&again, f.fd), 0);
	seam_set(&punch_seam, 0, punch_fails ? 1 << 30 : 0, ENOMEM);
	pthread_mutex_lock(&again->keeping);
	region_reset_chunks(again, nr_chunks);
	pthread_mutex_unlock(&again->keeping);
	assert_int_equal(again->nr_used, 8);
	f.region = again;
	assert_int_equal(region_start_keeper(again), 0);
	for (int i = 0; i < 8; i++)
		assert_int_equal(chunk_bytes_of(again, keep[i])[CHUNK - 1], (char)0xa5);
	for (int i = 0; i < 40; i++)
		use(again, take(again));
	close_region(&f);
}

static void test_reset_forgets_unused_chunks(void **state)
{
	(void)state;
	reset_forgets_unused_chunks(false);
	reset_forgets_unused_chunks(true);
}

static void assert_region_sound(struct region *region)
{
	char message[160];

	pthread_mutex_lock(&region->keeping);
	assert_that(region_check(region, message) == 0, "region_check: %s", message);
	pthread_mutex_unlock(&region->keeping);
}

/* As the next process does, while the OS has no memory. @nr_chunks: as if slots named none above. */
static struct region *reopen(struct fixture *f, uint32_t nr_chunks)
{
	region_destroy(f->region);
	seam_set(&populate_seam, 0, 1 << 30, ENOSPC);
	assert_int_equal(region_map(&f->region, f->fd), 0);
	pthread_mutex_lock(&f->region->keeping);
	region_reset_chunks(f->region, nr_chunks);
	pthread_mutex_unlock(&f->region->keeping);
	assert_region_sound(f->region);
	assert_int_equal(region_start_keeper(f->region), 0);
	return f->region;
}

/* The reserve outlives its process: nothing of it goes back to the OS, nothing is asked of it. */
static void test_reset_keeps_the_reserve(void **state)
{
	uint64_t returned, before;
	uint32_t nr_chunks = 0;
	struct region *region;
	struct fixture f;

	(void)state;
	region = open_region(&f, 100000, CHUNK, 0, 8 * CHUNK);
	await_ready(region, 8);
	for (int i = 0; i < 5; i++)
		take(region);
	region_replenish(region);
	before = resident(&f);
	returned = region->header->pages_returned;
	for (uint32_t c = 0; c < region_nr_touched(region); c++)
		if (region->chunks[c].state == CHUNK_USED)
			nr_chunks = c + 1;
	region = reopen(&f, nr_chunks);
	assert_int_equal(region->nr_used, 5);
	assert_int_equal(nr_ready(region), 8);
	assert_int_equal(resident(&f), before);
	assert_int_equal(region->header->pages_returned, returned);
	for (int i = 0; i < 8; i++)
		use(region, take(region));
	assert_int_equal(wait_ready(region, false), -ENOSPC);
	close_region(&f);
}

/* A chunk table that is wrong: what it calls READY is zero afterwards, holes stay holes, and no more
 * than the reserve is kept. */
static void test_reset_does_not_believe_the_table(void **state)
{
	struct region *region;
	struct fixture f;
	uint64_t before, arena, tables, reserve;

	(void)state;
	region = open_region(&f, 100000, CHUNK, 0, 4 * CHUNK);
	for (int i = 0; i < 30; i++) {
		uint32_t c = take(region);

		use(region, c);
		region->chunks[c].state = CHUNK_READY;
	}
	region_replenish(region);
	for (uint32_t c = 0; c < region->nr_chunks && c < 256; c++)
		if (c % 3 == 0 || c >= region_nr_touched(region)) {
			region_punch(region, c * CHUNK, CHUNK);
			region->chunks[c].state = CHUNK_READY;
		}
	before = region->header->pages_returned;
	region = reopen(&f, 2);
	assert_int_equal(region->nr_used, 0);
	assert_int_equal(nr_ready(region), 4);
	region_usage(region, &arena, &tables, &reserve);
	assert_int_equal(reserve, 4 * CHUNK);
	assert_int_equal(resident(&f), tables + reserve);
	assert_true(region->header->pages_returned > before);
	for (int i = 0; i < 4; i++)
		use(region, take(region));
	close_region(&f);
}

/* However often a store is adopted, nothing is returned by that. */
static void test_adopting_returns_nothing(void **state)
{
	static uint8_t pages[100 * PAGE_BYTES];
	int fd = open_memory();
	struct store *store = open_store(fd, 1000, 65536, 0, MIB);
	uint64_t returned;

	(void)state;
	for (uint64_t i = 0; i < 100; i++)
		make_page(pages + i * PAGE_BYTES, PAGE_RANDOM, i);
	assert_int_equal(store_write(store, 0, 100, pages), 100);
	returned = stats_of(store).pages_returned;
	for (int i = 0; i < 5; i++) {
		region_replenish(store->region);
		region_settle(store->region);
		assert_int_equal(stats_of(store).reserve_bytes, MIB);
		store_destroy(store);
		assert_int_equal(store_adopt(&store, fd), 0);
		assert_int_equal(stats_of(store).pages_returned, returned);
		assert_sound(store);
	}
	store_destroy(store);
	close(fd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_reset_forgets_unused_chunks),
		cmocka_unit_test(test_reset_keeps_the_reserve),
		cmocka_unit_test(test_reset_does_not_believe_the_table),
		cmocka_unit_test(test_adopting_returns_nothing),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
