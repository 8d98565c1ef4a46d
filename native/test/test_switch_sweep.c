/* SPDX-License-Identifier: MIT
 *
 * Failure sweep of the switch: the Nth read of the device, write to it, or send to pyfuse3 fails,
 * for every N of a run and for each error that may be. Whoever waits gets the right answer or an
 * error; each page holds what it held before, or what was written; nothing hangs.
 */
#define _GNU_SOURCE
#include "fake_kernel.h"

#include <sys/uio.h>

#define PAGES 24U

enum call { CALL_READ, CALL_WRITE, CALL_SEND, NR_CALLS };

static _Atomic int watched_fd[NR_CALLS];
static _Atomic int64_t countdown[NR_CALLS]; /* this many calls go well, then one fails */
static _Atomic int failure[NR_CALLS];

static bool fails(enum call call, int fd)
{
	if (fd != watched_fd[call] || countdown[call]-- != 0)
		return false;
	errno = failure[call];
	return true;
}

ssize_t __real_read(int fd, void *bytes, size_t nr);
ssize_t __wrap_read(int fd, void *bytes, size_t nr);
ssize_t __wrap_read(int fd, void *bytes, size_t nr)
{
	return fails(CALL_READ, fd) ? -1 : __real_read(fd, bytes, nr);
}

ssize_t __real_write(int fd, const void *bytes, size_t nr);
ssize_t __wrap_write(int fd, const void *bytes, size_t nr);
ssize_t __wrap_write(int fd, const void *bytes, size_t nr)
{
	return fails(CALL_WRITE, fd) ? -1 : __real_write(fd, bytes, nr);
}

ssize_t __real_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags)
{
	return fails(CALL_SEND, fd) ? -1 : __real_sendmsg(fd, message, flags);
}

/* What page 0..PAGES-1 may hold: seeds of fill(), 0 for zeroes. */
static struct {
	uint32_t before, after;
} model[PAGES];

static int nr_silent; /* requests that nobody answered */
static int patience_ms;

/* Return: the answer's error; 1: none came. */
static int outcome(struct world *w)
{
	if (readable(w->kernel, patience_ms))
		return answer(w);
	nr_silent++;
	return 1;
}

static void expect(const uint8_t *page, uint32_t index)
{
	static uint8_t want[PAGE_BYTES];
	uint32_t seeds[2] = {model[index].before, model[index].after};

	for (int i = 0; i < 2; i++) {
		if (seeds[i])
			fill(want, index * PAGE_BYTES, PAGE_BYTES, seeds[i]);
		else
			memset(want, 0, sizeof(want));
		if (!memcmp(page, want, PAGE_BYTES))
			return;
	}
	fail_msg("page %u is neither old nor new", index);
}

/* Pages [@from, @from+@nr-1] change to @seed, and have changed where @error is 0. */
static void change(uint32_t from, uint32_t nr, uint32_t seed, int error)
{
	for (uint32_t i = from; i < from + nr; i++) {
		model[i].after = seed;
		if (!error)
			model[i].before = seed;
	}
}

static void write_pages(struct world *w, uint32_t from, uint32_t nr, uint32_t seed)
{
	fill(pattern, from * PAGE_BYTES, nr * PAGE_BYTES, seed);
	make_write(w, from * PAGE_BYTES, nr * PAGE_BYTES, pattern);
	post(w);
	change(from, nr, seed, outcome(w));
}

static void read_pages(struct world *w, uint32_t from, uint32_t nr)
{
	struct fuse_read_in in = {.offset = from * PAGE_BYTES, .size = nr * PAGE_BYTES};

	make(w, FUSE_READ, SWAP, &in, sizeof(in));
	post(w);
	if (outcome(w))
		return;
	for (uint32_t i = 0; i < nr; i++)
		expect(got.raw + sizeof(got.out) + i * PAGE_BYTES, from + i);
}

static void punch_pages(struct world *w, uint32_t from, uint32_t nr)
{
	struct fuse_fallocate_in in = {.offset = from * PAGE_BYTES,
				       .length = nr * PAGE_BYTES,
				       .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE};

	make(w, FUSE_FALLOCATE, SWAP, &in, sizeof(in));
	post(w);
	change(from, nr, 0, outcome(w));
}

/* Something for pyfuse3; where that gets it, it answers. */
static void ask_python(struct world *w)
{
	uint64_t unique;

	make(w, FUSE_STATFS, OTHER, NULL, 0);
	unique = sent.in.unique;
	post(w);
	if (readable(w->python, patience_ms)) {
		receive(w->python);
		assert_int_equal(got.in.unique, unique);
		reply_of(unique, 0, pattern, 80);
		send(w->python, sent.raw, sent.bytes, 0);
		sent.in.unique = unique;
	}
	if (readable(w->kernel, patience_ms)) {
		receive(w->kernel);
		assert_int_equal(got.out.unique, unique);
	} else {
		nr_silent++;
	}
}

static void run(struct world *w)
{
	memset(model, 0, sizeof(model));
	write_pages(w, 0, 16, 1);
	write_pages(w, 20, 1, 2);
	read_pages(w, 0, 16);
	ask_python(w);
	punch_pages(w, 4, 8);
	write_pages(w, 8, 16, 3);
	read_pages(w, 0, 24);
}

static void end(struct world *w, int expected)
{
	char fault[160];
	static uint8_t page[PAGE_BYTES];

	shutdown(w->kernel, SHUT_WR);
	assert_int_equal(switch_join(w->sw), expected);
	assert_int_equal(store_check(w->store, fault), 0);
	for (uint32_t i = 0; i < PAGES; i++) {
		assert_int_equal(store_read(w->store, i, 1, page), 1);
		expect(page, i);
	}
	close_world(w);
}

/* Return: was there an Nth call? @is_end: it ends the switch. */
static bool sweep_one(enum call call, int64_t n, int error, bool is_end)
{
	struct world w;

	open_world(&w, 2, 0);
	watched_fd[call] = call == CALL_SEND ? w.options.socket_fd : w.options.fuse_fd;
	failure[call] = error;
	countdown[call] = n;
	assert_int_equal(switch_start(&w.sw, w.store, &w.options), 0);
	nr_silent = 0;
	/* Long, but where it is known that no answer may come. */
	patience_ms = is_end || error == ENOENT ? 60 : 1000;
	run(&w);
	is_end = is_end && countdown[call] < 0;
	end(&w, is_end ? -error : 0);
	watched_fd[call] = -1;
	/* ENOENT is the kernel's word that nobody waits any more. */
	if (!is_end)
		assert_true(nr_silent <= (call == CALL_WRITE && error == ENOENT));
	return countdown[call] < 0;
}

static void sweep(enum call call, int error, bool is_end)
{
	int64_t n = 0;

	while (sweep_one(call, n, error, is_end) && n < 1000)
		n++;
	assert_in_range(n, 1, 999);
}

static void test_replies_fail(void **state)
{
	static const int errors[] = {EIO, ENOMEM, EINTR, ENOENT, EINVAL};

	(void)state;
	for (size_t i = 0; i < ARRAY_SIZE(errors); i++)
		sweep(CALL_WRITE, errors[i], false);
}

static void test_messages_to_pyfuse3_fail(void **state)
{
	static const int errors[] = {ENOBUFS, EAGAIN, EINTR, EPIPE, EMSGSIZE};

	(void)state;
	for (size_t i = 0; i < ARRAY_SIZE(errors); i++)
		sweep(CALL_SEND, errors[i], false);
}

/* A failing device ends the switch, with its error: the supervisor has another worker try. */
static void test_reads_fail(void **state)
{
	struct world w;

	(void)state;
	for (int64_t n = 0; n < 12; n++) {
		sweep_one(CALL_READ, n, EINTR, false);
		sweep_one(CALL_READ, n, ENOENT, false);
		sweep_one(CALL_READ, n, EIO, true);
	}
	start(&w);
	stop(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_replies_fail),
		cmocka_unit_test(test_messages_to_pyfuse3_fail),
		cmocka_unit_test(test_reads_fail),
	};

	for (int i = 0; i < NR_CALLS; i++)
		watched_fd[i] = -1;
	return cmocka_run_group_tests(tests, NULL, NULL);
}
