/* SPDX-License-Identifier: MIT
 *
 * Tests of the switch: the backlog, what stays in buffers, and what CPUs do meanwhile.
 */
#define _GNU_SOURCE
#include "fake_kernel.h"
#include "pages.h"
#include "store.h"

#ifndef HAS_TSAN	 /* it would not see what poll() orders */
#define WIPE_AFTER_MS 10 /* nobody else waits that long */

/* The next so many polls of a lane that has content in its buffers see a request that is taken
 * back before it is read. */
static _Atomic int polls_mistaken;

int poll(struct pollfd *fds, nfds_t nr, int ms)
{
	struct timespec t = {ms / 1000, ms % 1000 * 1000000L};

	if (ms == WIPE_AFTER_MS && atomic_load(&polls_mistaken) > 0) {
		atomic_fetch_sub(&polls_mistaken, 1);
		return 1;
	}
	return ppoll(fds, nr, ms < 0 ? NULL : &t, NULL);
}
#endif

/* Post a write of 16 pages; return its unique. */
static uint64_t post_long_write(struct world *w, uint64_t offset)
{
	fill(pattern, offset, 16 * PAGE_BYTES, 1);
	make_write(w, offset, 16 * PAGE_BYTES, pattern);
	post(w);
	return sent.in.unique;
}

static void test_reads_overtake_writes(void **state)
{
	enum { NR_WRITES = 4 };
	uint64_t uniques = 0;
	struct world w;

	(void)state;
	start_with(&w, 2, 0);
	fill(pattern, 0, PAGE_BYTES, 7);
	assert_int_equal(write_at(&w, 0, PAGE_BYTES, pattern), PAGE_BYTES);
	/* Nothing can be allocated, so the first write does not end; the others wait for it. */
	arena_lock(&w.store->arena);
	for (uint32_t i = 0; i < NR_WRITES; i++)
		uniques += post_long_write(&w, (1 + i) * 16 * PAGE_BYTES);
	assert_false(readable(w.kernel, 50));
	assert_int_equal(read_at(&w, 0, PAGE_BYTES), PAGE_BYTES);
	fill(pattern, 0, PAGE_BYTES, 7);
	assert_memory_equal(content(), pattern, PAGE_BYTES);
	arena_unlock(&w.store->arena);
	for (uint32_t i = 0; i < NR_WRITES; i++) {
		receive(w.kernel);
		assert_int_equal(got.out.error, 0);
		uniques -= got.out.unique;
	}
	assert_int_equal(uniques, 0);
	for (uint32_t i = 0; i < NR_WRITES; i++) {
		uint64_t offset = (1 + i) * 16 * PAGE_BYTES;

		assert_int_equal(read_at(&w, offset, 16 * PAGE_BYTES), 16 * PAGE_BYTES);
		fill(pattern, offset, 16 * PAGE_BYTES, 1);
		assert_memory_equal(content(), pattern, 16 * PAGE_BYTES);
	}
	stop(&w);
}

/* Lanes answer a write a moment before they are done with it. */
static bool is_writing(struct fuse_switch *sw)
{
	bool writing;

	pthread_mutex_lock(&sw->backlog.lock);
	assert_true(sw->backlog.nr_writing || !sw->backlog.length);
	writing = sw->backlog.nr_writing != 0;
	pthread_mutex_unlock(&sw->backlog.lock);
	return writing;
}

static void test_a_full_backlog_is_emptied(void **state)
{
	/* More than wait, than lanes, and than buffers; far below what the socket holds. */
	enum { NR_WRITES = 3 * BACKLOG_LENGTH };
	struct world w;

	(void)state;
	for (uint32_t nr_lanes = 1; nr_lanes <= 4; nr_lanes++) {
		start_with(&w, nr_lanes, 0);
		for (uint32_t round = 0; round < 20; round++) {
			arena_lock(&w.store->arena);
			for (uint32_t i = 0; i < NR_WRITES; i++)
				post_long_write(&w, i * 16 * PAGE_BYTES);
			if (round % 2)
				usleep(1000);
			arena_unlock(&w.store->arena);
			for (uint32_t i = 0; i < NR_WRITES; i++) {
				receive(w.kernel);
				assert_int_equal(got.out.error, 0);
			}
		}
		while (is_writing(w.sw))
			usleep(1000);
		stop(&w);
	}
}

/* Have the keeper stand still, and no chunk READY. Return: how many were. */
static uint32_t take_reserve(struct region *region, uint32_t chunks[], uint32_t max)
{
	uint32_t nr = 0;

	pthread_mutex_lock(&region->keeping);
	while (!region_take_chunk(region, false, &chunks[nr]))
		assert_true(++nr < max);
	return nr;
}

/* A write of a page, of a part of one, or a punch of parts of two. */
static void post_short(struct world *w, uint32_t i)
{
	const uint32_t mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

	if (i == 2)
		make_fallocate(w, SWAP, PAGE_BYTES - 1, 2, mode);
	else
		make_write(w, 0, i ? 100 : PAGE_BYTES, pattern);
	post(w);
}

/* Short requests may have to wait for the keeper; others do not wait for them. */
static void test_reads_go_on_when_no_chunk_is_ready(void **state)
{
	enum { FULL_CHUNK_BYTES = STORE_MAX_CHUNK_BYTES / PAGE_BYTES * PAGE_BYTES - PAGE_BYTES };
	uint32_t chunks[64];
	uint64_t seed = 1;
	struct world w;

	(void)state;
	for (uint32_t i = 0; i < 3; i++) {
		uint32_t nr;

		start_with(&w, 2, 0);
		/* No room for another raw page in this chunk. */
		fill_random(pattern, FULL_CHUNK_BYTES, &seed);
		assert_int_equal(write_at(&w, 0, FULL_CHUNK_BYTES, pattern), FULL_CHUNK_BYTES);
		nr = take_reserve(w.store->region, chunks, ARRAY_SIZE(chunks));
		post_short(&w, i);
		assert_false(readable(w.kernel, 20));
		make_read(&w, 8 * PAGE_BYTES, PAGE_BYTES);
		assert_int_equal(ask(&w), 0);
		pthread_mutex_unlock(&w.store->region->keeping);
		receive(w.kernel);
		assert_int_equal(got.out.error, 0);
		while (nr--)
			region_give_chunk(w.store->region, chunks[nr]);
		stop(&w);
	}
}

#ifndef HAS_TSAN /* it looks at memory that lanes use */
static bool holds_marker(const struct fuse_switch *sw, const uint8_t marker[16])
{
	return memmem(sw->memory, sw->memory_bytes, marker, 16) != NULL;
}

static void test_buffers_keep_nothing(void **state)
{
	uint8_t marker[16];
	struct world w;
	int tries = 0;

	(void)state;
	start_with(&w, 3, 0);
	for (uint32_t i = 0; i < sizeof(pattern); i++)
		pattern[i] = (uint8_t)(i % 16 * 13 + 41);
	memcpy(marker, pattern, sizeof(marker));
	/* It would not be found if it could not be: but on a busy machine we may look too late. */
	do {
		assert_true(tries++ < 1000);
		assert_int_equal(write_at(&w, 0, REQUEST_BYTES, pattern), REQUEST_BYTES);
	} while (!holds_marker(w.sw, marker));
	assert_int_equal(read_at(&w, 0, REQUEST_BYTES), REQUEST_BYTES);
	assert_int_equal(read_at(&w, PAGE_BYTES, PAGE_BYTES), PAGE_BYTES);
	for (tries = 0; tries < 200 && holds_marker(w.sw, marker); tries++)
		usleep(10000);
	assert_false(holds_marker(w.sw, marker));
	stop(&w);
}

/* A task that is killed takes its request back, between poll() and read(). */
static void test_buffers_keep_nothing_when_a_request_is_taken_back(void **state)
{
	uint8_t marker[16];
	struct world w;
	int tries = 0;

	(void)state;
	start_with(&w, 3, 0);
	for (uint32_t i = 0; i < sizeof(pattern); i++)
		pattern[i] = (uint8_t)(i % 16 * 17 + 29);
	memcpy(marker, pattern, sizeof(marker));
	atomic_store(&polls_mistaken, 1);
	assert_int_equal(write_at(&w, 0, REQUEST_BYTES, pattern), REQUEST_BYTES);
	for (; tries < 200 && (atomic_load(&polls_mistaken) || holds_marker(w.sw, marker)); tries++)
		usleep(10000);
	assert_int_equal(atomic_load(&polls_mistaken), 0);
	assert_false(holds_marker(w.sw, marker));
	stop(&w);
}
#endif

/* What was written to a pipe in place of /dev/cpu_dma_latency; -1: nothing within @ms. */
static int32_t latency_asked(int fd, int ms)
{
	int32_t us;

	if (!readable(fd, ms))
		return -1;
	assert_int_equal(read(fd, &us, sizeof(us)), sizeof(us));
	return us;
}

static void test_cpus_are_kept_awake_while_requests_come(void **state)
{
	struct world w;
	int fds[2];

	(void)state;
	open_world(&w, 2, 0);
	assert_int_equal(pipe(fds), 0);
	w.options.latency_fd = fds[1];
	w.options.spin_us = 1000;
	assert_int_equal(switch_start(&w.sw, w.store, &w.options), 0);
	assert_int_equal(read_at(&w, 0, PAGE_BYTES), PAGE_BYTES);
	assert_int_equal(latency_asked(fds[0], 20), -1);
	/* Until enough of them come close enough, on a busy machine too. */
	for (int tries = 0; !readable(fds[0], 0); tries++) {
		assert_true(tries < 100000);
		assert_int_equal(read_at(&w, 0, PAGE_BYTES), PAGE_BYTES);
	}
	assert_int_equal(latency_asked(fds[0], 0), 0);
	assert_int_equal(latency_asked(fds[0], 10000), 2000000000);
	stop(&w);
	close(fds[0]);
	close(fds[1]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_reads_overtake_writes),
		cmocka_unit_test(test_a_full_backlog_is_emptied),
		cmocka_unit_test(test_reads_go_on_when_no_chunk_is_ready),
#ifndef HAS_TSAN
		cmocka_unit_test(test_buffers_keep_nothing),
		cmocka_unit_test(test_buffers_keep_nothing_when_a_request_is_taken_back),
#endif
		cmocka_unit_test(test_cpus_are_kept_awake_while_requests_come),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
