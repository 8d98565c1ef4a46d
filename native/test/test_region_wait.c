/* SPDX-License-Identifier: MIT
 *
 * Whoever waits for the keeper to populate chunks gets one, or learns in time that there is none.
 */
#include "region_fixture.h"

/* While the OS has no memory, taking fails cleanly; as soon as it has some, it goes on. */
static void test_failed_populate_is_enospc_until_it_works(void **state)
{
	struct fixture f;
	uint32_t c, nr = 0;
	int rv;

	(void)state;
	open_region(&f, 100000, CHUNK, 0, 4 * CHUNK);
	await_ready(f.region, 4);
	seam_set(&populate_seam, 0, 1 << 30, ENOSPC);
	while ((rv = region_take_chunk(f.region, false, &c)) == 0)
		nr++;
	assert_int_equal(rv, -EAGAIN);
	assert_int_equal(nr, 4);
	for (int i = 0; i < 20; i++) {
		assert_int_equal(wait_ready(f.region, false), -ENOSPC);
		assert_int_equal(region_take_chunk(f.region, false, &c), -EAGAIN);
	}
	seam_reset();
	assert_int_equal(wait_ready(f.region, false), 0);
	use(f.region, take(f.region));
	close_region(&f);
}

struct waiter {
	struct region *region;
	_Atomic int rv;
};

static void *wait_for_chunk(void *arg)
{
	struct waiter *w = arg;

	w->rv = wait_ready(w->region, false);
	return NULL;
}

/* Whoever waits for the keeper takes a chunk that somebody gives back meanwhile. */
static void test_given_chunk_ends_the_wait(void **state)
{
	struct fixture f;
	struct waiter w;
	pthread_t thread;
	uint32_t c;

	(void)state;
	w.region = open_region(&f, 100000, CHUNK, 0, CHUNK);
	w.rv = 1;
	c = take(f.region);
	await_ready(f.region, 1);
	pthread_mutex_lock(&f.region->keeping); /* the keeper can do nothing */
	take(f.region);
	pthread_create(&thread, NULL, wait_for_chunk, &w);
	usleep(20000);
	assert_int_equal(w.rv, 1);
	give(f.region, c);
	for (int i = 0; i < 2000 && w.rv == 1; i++)
		usleep(1000);
	assert_int_equal(w.rv, 0);
	pthread_mutex_unlock(&f.region->keeping);
	pthread_join(thread, NULL);
	close_region(&f);
}

static uint64_t ms_since(uint64_t began)
{
	return (now_ns() - began) / 1000000;
}

/* Wait in another thread; @rv becomes what came of it. */
static pthread_t start_waiting(struct waiter *w, struct region *region)
{
	pthread_t thread;

	*w = (struct waiter){.region = region, .rv = 1};
	assert_int_equal(pthread_create(&thread, NULL, wait_for_chunk, w), 0);
	return thread;
}

static void await_end(const struct waiter *w, uint64_t max_ms)
{
	uint64_t began = now_ns();

	while (w->rv == 1 && ms_since(began) < max_ms)
		usleep(500);
}

/* A keeper that hangs in the kernel is waited for a second, by all who wait together, and then by
 * nobody until it has got memory again. */
static void test_stuck_keeper_is_not_waited_for(void **state)
{
	struct waiter waiters[3];
	pthread_t threads[3];
	struct fixture f;
	uint64_t began, later;

	(void)state;
	open_region(&f, 100000, CHUNK, 0, CHUNK);
	await_ready(f.region, 1);
	pthread_mutex_lock(&f.region->keeping); /* the keeper can do nothing */
	take(f.region);
	began = now_ns();
	for (int i = 0; i < 3; i++)
		threads[i] = start_waiting(&waiters[i], f.region);
	for (int i = 0; i < 3; i++)
		await_end(&waiters[i], 5000);
	later = now_ns();
	if (waiters[0].rv != 1)
		for (int i = 0; i < 100; i++)
			assert_int_equal(wait_ready(f.region, false), -ENOSPC);
	later = ms_since(later);
	pthread_mutex_unlock(&f.region->keeping);
	for (int i = 0; i < 3; i++) {
		pthread_join(threads[i], NULL);
		assert_int_equal(waiters[i].rv, -ENOSPC);
	}
	assert_in_range(ms_since(began), 900, 3000);
	assert_in_range(later, 0, 500);
	/* It need not be asked for that. */
	await_ready(f.region, 1);
	take(f.region);
	assert_int_equal(wait_ready(f.region, false), 0);
	close_region(&f);
}

/* The second holds for all waits of a request; having been late oneself is not the keeper's fault. */
static void test_patience_is_for_all_waits(void **state)
{
	struct region_patience patience = {0};
	struct fixture f;

	(void)state;
	open_region(&f, 100000, CHUNK, 0, CHUNK);
	await_ready(f.region, 1);
	assert_int_equal(region_wait_ready(f.region, false, &patience), 0);
	usleep(1100000);
	take(f.region);
	await_ready(f.region, 1);
	pthread_mutex_lock(&f.region->keeping);
	take(f.region);
	assert_int_equal(region_wait_ready(f.region, false, &patience), -ENOSPC);
	assert_false(f.region->stuck);
	pthread_mutex_unlock(&f.region->keeping);
	assert_int_equal(wait_ready(f.region, false), 0);
	close_region(&f);
}

/* Who waits learns that a try failed, also when somebody else asks for the next one at once. */
static void test_failed_try_is_not_forgotten(void **state)
{
	struct fixture f;
	struct waiter w;
	pthread_t thread;

	(void)state;
	open_region(&f, 100000, CHUNK, 0, CHUNK);
	await_ready(f.region, 1);
	pthread_mutex_lock(&f.region->keeping);
	take(f.region);
	thread = start_waiting(&w, f.region);
	pthread_mutex_lock(&f.region->lock);
	while (f.region->wanted_try != f.region->nr_tries + 1) {
		pthread_mutex_unlock(&f.region->lock);
		usleep(1000);
		pthread_mutex_lock(&f.region->lock);
	}
	/* As the keeper and the next caller do before the first one has the lock again. */
	f.region->failed_try = ++f.region->nr_tries;
	pthread_cond_broadcast(&f.region->change);
	f.region->wanted_try = f.region->nr_tries + 1;
	pthread_mutex_unlock(&f.region->lock);
	await_end(&w, 500);
	assert_int_equal(w.rv, -ENOSPC);
	assert_false(f.region->stuck);
	pthread_mutex_unlock(&f.region->keeping);
	pthread_join(thread, NULL);
	close_region(&f);
}

/* Where there is no chunk, the first one is to be had before others are populated. */
static void test_first_chunk_comes_alone(void **state)
{
	struct fixture f;

	(void)state;
	/* Pass the chunk table's first page, and one batch. */
	seam_set(&populate_seam, 2, 1 << 30, ENOSPC);
	open_region(&f, 100000, CHUNK, 0, 16 * CHUNK);
	await_ready(f.region, 1);
	usleep(5000);
	assert_int_equal(nr_ready(f.region), 1);
	seam_reset();
	close_region(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_failed_populate_is_enospc_until_it_works),
		cmocka_unit_test(test_given_chunk_ends_the_wait),
		cmocka_unit_test(test_stuck_keeper_is_not_waited_for),
		cmocka_unit_test(test_patience_is_for_all_waits),
		cmocka_unit_test(test_failed_try_is_not_forgotten),
		cmocka_unit_test(test_first_chunk_comes_alone),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
