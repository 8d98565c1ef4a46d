/* SPDX-License-Identifier: MIT
 *
 * Tests of the switch: what a second worker finds of the first, and how one sees that lanes hang.
 */
#define _GNU_SOURCE
#include "fake_kernel.h"

#define RESEND 7

static struct fuse_init_in init = {.major = 7, .minor = 45, .flags = 0xff};

static void answer_init(struct world *w, int error)
{
	struct fuse_init_out out = {.major = 7, .minor = 31, .flags = 0xff};

	receive(w->python);
	assert_int_equal(got.in.opcode, FUSE_INIT);
	assert_memory_equal(got.raw + sizeof(got.in), &init, sizeof(init));
	reply_of(got.in.unique, error, &out, error ? 0 : sizeof(out));
	send(w->python, sent.raw, sent.bytes, 0);
}

/* A worker that served INIT and has ended, its region left behind. */
static void serve_and_end(struct world *w)
{
	start(w);
	make(w, FUSE_INIT, 0, &init, sizeof(init));
	post(w);
	answer_init(w, 0);
	receive(w->kernel);
	fill(pattern, 0, PAGE_BYTES, 3);
	assert_int_equal(write_at(w, 0, PAGE_BYTES, pattern), PAGE_BYTES);
	shutdown(w->kernel, SHUT_WR);
	assert_int_equal(switch_join(w->sw), 0);
	store_destroy(w->store);
	close(w->kernel);
	close(w->python);
	close(w->options.fuse_fd);
	close(w->options.socket_fd);
	close(w->options.end_fd);
}

static void take_over(struct world *w)
{
	pair_of_devices(w);
	assert_int_equal(store_adopt(&w->store, w->region_fd), 0);
	assert_int_equal(switch_start(&w->sw, w->store, &w->options), 0);
}

static void test_next_worker_resumes(void **state)
{
	struct world w;

	(void)state;
	serve_and_end(&w);
	take_over(&w);
	/* Before any request is read, the kernel is asked for those that were under way. */
	receive(w.kernel);
	assert_int_equal(got.bytes, sizeof(got.out));
	assert_int_equal(got.out.error, RESEND);
	assert_int_equal(got.out.unique, 0);
	/* Pages are served while pyfuse3 has yet to say that it is there. */
	assert_int_equal(read_at(&w, 0, PAGE_BYTES), PAGE_BYTES);
	fill(pattern, 0, PAGE_BYTES, 3);
	assert_memory_equal(content(), pattern, PAGE_BYTES);
	assert_false(switch_ready(w.sw));
	answer_init(&w, 0);
	for (int i = 0; !switch_ready(w.sw) && i < 1000; i++)
		usleep(1000);
	assert_true(switch_ready(w.sw));
	/* The kernel had its answer long ago, and gets no second one. */
	assert_false(readable(w.kernel, 20));
	make(&w, FUSE_INIT, 0, &init, sizeof(init));
	assert_int_equal(ask(&w), -EINVAL);
	stop(&w);
}

/* A damaged INIT could make pyfuse3 do anything: it gets none. */
static void test_damaged_init_is_not_replayed(void **state)
{
	static const size_t places[] = {
		offsetof(struct journal, init_sum), offsetof(struct journal, init_bytes),
		offsetof(struct journal, init_bytes) + 3, offsetof(struct journal, init) + 40};
	struct world w;

	(void)state;
	for (size_t i = 0; i < ARRAY_SIZE(places); i++) {
		off_t at = (off_t)(offsetof(struct region_header, journal) + places[i]);
		uint8_t byte;

		serve_and_end(&w);
		assert_int_equal(pread(w.region_fd, &byte, 1, at), 1);
		byte ^= 0x10;
		assert_int_equal(pwrite(w.region_fd, &byte, 1, at), 1);
		take_over(&w);
		receive(w.kernel);
		assert_int_equal(got.out.error, RESEND);
		assert_int_equal(read_at(&w, 0, PAGE_BYTES), PAGE_BYTES);
		make(&w, FUSE_STATFS, OTHER, NULL, 0);
		assert_int_equal(ask(&w), -EIO);
		assert_false(readable(w.python, 0));
		assert_true(switch_ready(w.sw));
		stop(&w);
	}
}

static uint32_t nr_busy(const struct world *w, uint64_t *sum)
{
	uint64_t steps[SWITCH_MAX_LANES];
	uint32_t nr = 0;

	*sum = 0;
	assert_int_equal(region_steps(w->region_fd, steps), 0);
	for (int i = 0; i < SWITCH_MAX_LANES; i++) {
		nr += steps[i] & 1;
		*sum += steps[i];
	}
	return nr;
}

/* Wait until that many lanes have a request. Return: the sum of all steps then. */
static uint64_t await_busy(const struct world *w, uint32_t nr)
{
	uint64_t sum;
	int tries = 0;

	while (nr_busy(w, &sum) != nr) {
		assert_true(tries++ < 10000);
		usleep(1000);
	}
	return sum;
}

static void test_lanes_show_what_they_do(void **state)
{
	uint64_t idle, busy, sum;
	struct world w;

	(void)state;
	start_with(&w, 2, 0);
	idle = await_busy(&w, 0);
	/* A page's write does not end: nothing can be allocated. */
	arena_lock(&w.store->arena);
	fill(pattern, 0, PAGE_BYTES, 5);
	make_write(&w, 0, PAGE_BYTES, pattern);
	post(&w);
	busy = await_busy(&w, 1);
	assert_true(busy != idle);
	usleep(20000);
	assert_int_equal(nr_busy(&w, &sum), 1);
	assert_true(sum == busy);
	arena_unlock(&w.store->arena);
	assert_int_equal(answer(&w), 0);
	assert_true(await_busy(&w, 0) != busy);
	stop(&w);
}

/* One request, and much to free: the lane is seen to move, and seen to be at it. */
static void test_a_long_punch_shows_its_steps(void **state)
{
	const uint32_t mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	const uint64_t pages[] = {0, NR_PAGES / 2 - 1, NR_PAGES - 1};
	uint64_t idle, first, second;
	struct world w;

	(void)state;
	start_with(&w, 2, 0);
	for (size_t i = 0; i < ARRAY_SIZE(pages); i++) {
		fill(pattern, 0, PAGE_BYTES, 5);
		assert_int_equal(write_at(&w, pages[i] * PAGE_BYTES, PAGE_BYTES, pattern),
				 PAGE_BYTES);
	}
	idle = await_busy(&w, 0);
	/* It stands still at the first page, then at the last. */
	slot_lock(&w.store->region->slots[0]);
	slot_lock(&w.store->region->slots[NR_PAGES - 1]);
	make_fallocate(&w, SWAP, 100, FILE_BYTES, mode);
	post(&w);
	first = await_busy(&w, 1);
	assert_true(first != idle);
	slot_unlock(&w.store->region->slots[0]);
	for (int tries = 0; (second = await_busy(&w, 1)) == first; tries++) {
		assert_true(tries < 5000);
		usleep(1000);
	}
	slot_unlock(&w.store->region->slots[NR_PAGES - 1]);
	assert_int_equal(answer(&w), 0);
	assert_true(await_busy(&w, 0) != second);
	for (size_t i = 0; i < ARRAY_SIZE(pages); i++) {
		assert_int_equal(read_at(&w, pages[i] * PAGE_BYTES, PAGE_BYTES), PAGE_BYTES);
		memset(pattern, 0, PAGE_BYTES);
		if (!i)
			fill(pattern, 0, 100, 5);
		assert_memory_equal(content(), pattern, PAGE_BYTES);
	}
	stop(&w);
}

/* Whatever a dead worker's lane was at. */
static void test_new_lanes_begin_idle(void **state)
{
	off_t at =
		(off_t)(offsetof(struct region_header, journal) + offsetof(struct journal, lanes));
	uint64_t odd = 77;
	struct world w;

	(void)state;
	serve_and_end(&w);
	assert_int_equal(pwrite(w.region_fd, &odd, sizeof(odd), at), sizeof(odd));
	take_over(&w);
	await_busy(&w, 0);
	stop(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_next_worker_resumes),
		cmocka_unit_test(test_damaged_init_is_not_replayed),
		cmocka_unit_test(test_lanes_show_what_they_do),
		cmocka_unit_test(test_a_long_punch_shows_its_steps),
		cmocka_unit_test(test_new_lanes_begin_idle),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
