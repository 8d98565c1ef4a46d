/* SPDX-License-Identifier: MIT
 *
 * Pages of the tables are there before a lane touches them.
 */
#include "fixture.h"

#include <sys/resource.h>

#define CLUSTER 512ULL

/* Until the keeper has nothing to do. */
static void settle(struct region *region)
{
	bool busy = true;

	while (busy) {
		usleep(200);
		pthread_mutex_lock(&region->keeping);
		pthread_mutex_lock(&region->lock);
		busy = region->fresh || region->nr_ready < region->reserve / 4 * 3;
		pthread_mutex_unlock(&region->lock);
		pthread_mutex_unlock(&region->keeping);
	}
}

/* Page faults of this thread while pages of @cluster are written. */
static long faults_of(struct store *store, uint64_t cluster, enum page_kind kind)
{
	static uint8_t pages[32 * PAGE_BYTES];
	struct rusage before, after;

	for (uint64_t i = 0; i < 32; i++)
		make_page(pages + i * PAGE_BYTES, kind, cluster * 32 + i);
	getrusage(RUSAGE_THREAD, &before);
	assert_int_equal(store_write(store, cluster * CLUSTER, 32, pages), 32);
	getrusage(RUSAGE_THREAD, &after);
	settle(store->region);
	return after.ru_minflt - before.ru_minflt;
}

static void assert_no_faults(uint64_t step, enum page_kind kind)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 1024 * CLUSTER, 65536, 0, MIB);
	long faults = 0;

	settle(store->region);
	for (uint64_t i = 0; i < 30; i++) {
		long nr = faults_of(store, i * step, kind);

		/* The first ones tell the step, and touch desks and stack. */
		faults += i < 4 ? 0 : nr;
	}
	assert_true(faults == 0 || IS_SANITIZED);
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

/* Clusters touched one behind the other, or in equal steps: after the first ones writing there
 * takes no memory from the OS. */
static void test_next_clusters_are_there(void **state)
{
	(void)state;
	assert_no_faults(1, PAGE_TEXT);
	assert_no_faults(32, PAGE_TEXT);
	assert_no_faults(1, PAGE_WORD_64);
	assert_no_faults(7, PAGE_WORD_64);
}

/* Two CPUs take clusters in turn, and one is late. */
static void test_order_need_not_be_exact(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 1024 * CLUSTER, 65536, 0, MIB);
	long faults = 0;

	(void)state;
	settle(store->region);
	for (uint64_t i = 0; i < 60; i++) {
		long nr = faults_of(store, (i ^ 1) * 16, PAGE_TEXT);

		faults += i < 6 ? 0 : nr;
	}
	assert_true(faults == 0 || IS_SANITIZED);
	store_destroy(store);
	close(fd);
}

/* Anywhere and nowhere near: nothing is populated for that. The end of the table is its end. */
static void test_scattered_clusters_cost_nothing_more(void **state)
{
	static const uint64_t clusters[] = {70, 3, 99, 0, 51, 20, 98, 97, 96, 95};
	int fd = open_memory();
	struct store *store = open_store(fd, 100 * CLUSTER + 1, 65536, 0, MIB);
	uint64_t empty;

	(void)state;
	settle(store->region);
	empty = stats_of(store).table_bytes;
	for (uint64_t i = 0; i < ARRAY_SIZE(clusters); i++) {
		faults_of(store, clusters[i], PAGE_TEXT);
		assert_true(stats_of(store).table_bytes <= empty + (i + 2) * PAGE_BYTES);
	}
	assert_int_equal(store_discard(store, 0, 100 * CLUSTER + 1), 32 * ARRAY_SIZE(clusters));
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_next_clusters_are_there),
		cmocka_unit_test(test_order_need_not_be_exact),
		cmocka_unit_test(test_scattered_clusters_cost_nothing_more),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
