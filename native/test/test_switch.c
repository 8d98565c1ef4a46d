/* SPDX-License-Identifier: MIT
 *
 * Tests of the switch: page requests, what is malformed, start and end.
 */
#define _GNU_SOURCE
#include "fake_kernel.h"

#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/syscall.h>

/* Calls that a test can have fail: the first *_pass go to the real ones, the next ends with EIO
 * or EAGAIN. -1: none fails. */
static _Atomic int write_pass = -1;

ssize_t write(int fd, const void *bytes, size_t nr)
{
	if (atomic_load(&write_pass) >= 0 && atomic_fetch_sub(&write_pass, 1) == 0) {
		errno = EFAULT;
		return -1;
	}
	return syscall(SYS_write, fd, bytes, nr);
}

#ifndef HAS_TSAN
static _Atomic int thread_pass = -1;

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg)
{
	static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
	if (atomic_load(&thread_pass) >= 0 && atomic_fetch_sub(&thread_pass, 1) == 0)
		return EAGAIN;
	return real(thread, attr, run, arg);
}
#endif

static void test_reads_return_what_was_written(void **state)
{
	static const struct {
		uint64_t offset;
		uint32_t size;
	} spans[] = {{0, PAGE_BYTES},
		     {8 * PAGE_BYTES, REQUEST_BYTES},
		     {100, 50},
		     {5 * PAGE_BYTES - 7, 20},
		     {3000, 100001},
		     {4095, 1},
		     {FILE_BYTES - 1, 1},
		     {FILE_BYTES - 5000, 5000},
		     {12, 0}};
	struct world w;

	(void)state;
	start(&w);
	for (uint32_t i = 0; i < ARRAY_SIZE(spans); i++) {
		fill(pattern, spans[i].offset, spans[i].size, i);
		assert_int_equal(write_at(&w, spans[i].offset, spans[i].size, pattern),
				 spans[i].size);
		assert_int_equal(read_at(&w, spans[i].offset, spans[i].size), spans[i].size);
		assert_memory_equal(content(), pattern, spans[i].size);
	}
	stop(&w);
}

static void test_the_end_of_the_file_is_an_end(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	fill(pattern, FILE_BYTES - 8192, 8192, 1);
	assert_int_equal(write_at(&w, FILE_BYTES - 8192, 8192, pattern), 8192);
	assert_int_equal(read_at(&w, FILE_BYTES - 8192, 65536), 8192);
	assert_memory_equal(content(), pattern, 8192);
	assert_int_equal(read_at(&w, FILE_BYTES, 4096), 0);
	assert_int_equal(read_at(&w, FILE_BYTES + (1ULL << 40), 4096), 0);
	assert_int_equal(write_at(&w, FILE_BYTES - 4096, 8192, pattern), -EFBIG);
	assert_int_equal(write_at(&w, FILE_BYTES, 1, pattern), -EFBIG);
	assert_int_equal(read_at(&w, FILE_BYTES - 8192, 8192), 8192);
	assert_memory_equal(content(), pattern, 8192);
	stop(&w);
}

static void test_fallocate_frees_and_never_says_what_turns_discard_off(void **state)
{
	const uint32_t punch = FALLOC_FL_PUNCH_HOLE, zero = FALLOC_FL_ZERO_RANGE;
	const uint32_t keep = FALLOC_FL_KEEP_SIZE;
	const uint64_t max = INT64_MAX;
	const struct {
		uint64_t offset, length;
		uint32_t mode;
		int error;
	} cases[] = {
		{4096, 8192, punch | keep, 0},
		{4096, 8192, zero | keep, 0},
		{4096, 8192, zero, 0},
		{0, FILE_BYTES, punch | keep, 0},
		{100, 5000, punch | keep, 0},
		{FILE_BYTES - 4096, 1 << 20, punch | keep, 0},
		{FILE_BYTES + 4096, 4096, zero | keep, 0},
		{FILE_BYTES - 4096, 8192, zero, -EFBIG},
		{FILE_BYTES, 1, zero, -EFBIG},
		{0, 4096, 0, -EOPNOTSUPP},
		{0, 4096, keep, -EOPNOTSUPP},
		{0, 4096, FALLOC_FL_COLLAPSE_RANGE, -EOPNOTSUPP},
		{0, 4096, FALLOC_FL_INSERT_RANGE, -EOPNOTSUPP},
		{0, 4096, FALLOC_FL_UNSHARE_RANGE | keep, -EOPNOTSUPP},
		{0, 4096, 1U << 31, -EOPNOTSUPP},
		{0, 4096, punch, -EINVAL},
		{0, 4096, punch | zero | keep, -EINVAL},
		{0, 4096, punch | keep | 1U << 20, -EINVAL},
		{0, 0, punch | keep, -EINVAL},
		{max, 1, punch | keep, -EINVAL},
		{1, max, zero | keep, -EINVAL},
		{UINT64_MAX, 4096, punch | keep, -EINVAL},
		{4096, UINT64_MAX - 100, zero, -EINVAL},
		{1ULL << 63, 1ULL << 63, zero | keep, -EINVAL},
		{0, max, punch | keep, 0},
	};
	struct world w;

	(void)state;
	start(&w);
	for (uint32_t i = 0; i < ARRAY_SIZE(cases); i++) {
		uint64_t invalid = invalid_io(&w);

		make_fallocate(&w, SWAP, cases[i].offset, cases[i].length, cases[i].mode);
		assert_int_equal(ask(&w), cases[i].error);
		assert_int_equal(invalid_io(&w) - invalid, cases[i].error == -EINVAL);
	}
	stop(&w);
}

static void test_freed_pages_read_as_zeroes(void **state)
{
	static const uint32_t modes[] = {FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					 FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
					 FALLOC_FL_ZERO_RANGE};
	struct store_stats stats;
	struct world w;

	(void)state;
	start(&w);
	fill(pattern, 0, 65536, 5);
	for (uint32_t i = 0; i < ARRAY_SIZE(modes); i++) {
		assert_int_equal(write_at(&w, 0, 65536, pattern), 65536);
		make_fallocate(&w, SWAP, 4096 + 96, 40000, modes[i]);
		assert_int_equal(ask(&w), 0);
		assert_int_equal(read_at(&w, 0, 65536), 65536);
		memcpy(sent.raw, pattern, 65536);
		memset(sent.raw + 4096 + 96, 0, 40000);
		assert_memory_equal(content(), sent.raw, 65536);
	}
	make_fallocate(&w, SWAP, 0, FILE_BYTES, modes[0]);
	assert_int_equal(ask(&w), 0);
	store_get_stats(w.store, &stats);
	assert_int_equal(stats.pages_stored, 0);
	stop(&w);
}

static void test_other_files_fallocate_is_answered_here(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	make_fallocate(&w, OTHER, 0, 4096, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
	assert_int_equal(ask(&w), -EOPNOTSUPP);
	make_fallocate(&w, OTHER, 0, 4096, 0);
	assert_int_equal(ask(&w), -EOPNOTSUPP);
	assert_false(readable(w.python, 20));
	stop(&w);
}

static void test_fsync_is_answered_here_for_the_swap_file_only(void **state)
{
	struct fuse_flush_in flush = {.fh = 1};
	struct fuse_fsync_in in = {.fh = 1};
	struct world w;

	(void)state;
	start(&w);
	make(&w, FUSE_FSYNC, SWAP, &in, sizeof(in));
	assert_int_equal(ask(&w), 0);
	assert_int_equal(got.bytes, sizeof(got.out));
	assert_false(readable(w.python, 20));
	make(&w, FUSE_FSYNC, OTHER, &in, sizeof(in));
	post(&w);
	receive(w.python);
	make(&w, FUSE_FLUSH, SWAP, &flush, sizeof(flush));
	assert_int_equal(ask(&w), 0);
	assert_false(readable(w.python, 20));
	make(&w, FUSE_FLUSH, OTHER, &flush, sizeof(flush));
	post(&w);
	receive(w.python);
	stop(&w);
}

static void test_interrupts_are_dropped(void **state)
{
	struct fuse_interrupt_in in = {.unique = 77};
	struct world w;

	(void)state;
	start(&w);
	make(&w, FUSE_INTERRUPT, 0, &in, sizeof(in));
	post(&w);
	assert_int_equal(read_at(&w, 0, 4096), 4096);
	assert_false(readable(w.kernel, 20));
	assert_false(readable(w.python, 0));
	assert_int_equal(invalid_io(&w), 0);
	stop(&w);
}

/* FUSE_NOTIFY_RESEND sets bit 63 of unique; the answer has it too. */
static void test_resent_requests_are_served(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	fill(pattern, 0, 4096, 1);
	make_write(&w, 0, 4096, pattern);
	sent.in.unique |= 1ULL << 63;
	assert_int_equal(ask(&w), 0);
	make_read(&w, 0, 4096);
	sent.in.unique |= 1ULL << 63;
	assert_int_equal(ask(&w), 0);
	assert_memory_equal(content(), pattern, 4096);
	make(&w, FUSE_GETATTR, OTHER, NULL, 0);
	sent.in.unique |= 1ULL << 63;
	post(&w);
	receive(w.python);
	assert_int_equal(got.in.unique, sent.in.unique);
	stop(&w);
}

/* An extension at the message's end belongs neither to the arguments nor to the content. */
static void test_extensions_are_not_content(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	fill(pattern, 0, 4096, 1);
	make_write(&w, 0, 4096, pattern);
	add("extended", 8);
	sent.in.total_extlen = 1;
	assert_int_equal(ask(&w), 0);
	make_read(&w, 0, 8192);
	add("extended", 8);
	sent.in.total_extlen = 1;
	assert_int_equal(ask(&w), 0);
	assert_memory_equal(content(), pattern, 4096);
	stop(&w);
}

/* One malformed message each: what its arguments say, how many bytes of them are sent, and how far
 * header.len and header.total_extlen are wrong. */
static const struct malformed {
	uint32_t opcode, node;
	uint64_t offset;
	uint32_t size;
	size_t sent_bytes; /* of the arguments and what follows them */
	int len_off;
	uint16_t extensions;
} malformed[] = {
	{FUSE_READ, SWAP, 0, 4096, 40, -1, 0},
	{FUSE_READ, SWAP, 0, 4096, 40, 4096, 0},
	{FUSE_READ, SWAP, 0, 4096, 32, 0, 0},
	{FUSE_READ, SWAP, 0, 4096, 48, 0, 0},
	{FUSE_READ, SWAP, 0, 4096, 0, 0, 0},
	{FUSE_READ, SWAP, 0, 4096, 40, 0, 1},
	{FUSE_READ, SWAP, 0, 4096, 40, 0, UINT16_MAX},
	{FUSE_READ, SWAP, 0, REQUEST_BYTES + 1, 40, 0, 0},
	{FUSE_READ, SWAP, 0, UINT32_MAX, 40, 0, 0},
	{FUSE_READ, SWAP, INT64_MAX - 4095, 4097, 40, 0, 0},
	{FUSE_READ, SWAP, UINT64_MAX, 4096, 40, 0, 0},
	{FUSE_WRITE, SWAP, 0, 4096, 0, 0, 0},
	{FUSE_WRITE, SWAP, 0, 4096, 39, 0, 0},
	{FUSE_WRITE, SWAP, 0, 4096, 40, 0, 0},
	{FUSE_WRITE, SWAP, 0, 4096, 40 + 4095, 0, 0},
	{FUSE_WRITE, SWAP, 0, 4096, 40 + 4097, 0, 0},
	{FUSE_WRITE, SWAP, 0, 4096, 40 + 4096, 0, 1},
	{FUSE_WRITE, SWAP, 0, UINT32_MAX, 40 + 4096, 0, 0},
	{FUSE_WRITE, SWAP, INT64_MAX, 4096, 40 + 4096, 0, 0},
	{FUSE_WRITE, SWAP, UINT64_MAX - 4095, 8192, 40 + 8192, 0, 0},
	{FUSE_FALLOCATE, SWAP, 0, 4096, 31, 0, 0},
	{FUSE_FALLOCATE, OTHER, 0, 4096, 32, 1, 0},
	{FUSE_FSYNC, SWAP, 0, 0, 15, 0, 0},
	{FUSE_FSYNC, SWAP, 0, 0, 24, 0, 0},
	{FUSE_FLUSH, SWAP, 0, 0, 16, 0, 0},
	{FUSE_GETATTR, OTHER, 0, 0, 16, 1, 0},
	{FUSE_GETATTR, OTHER, 0, 0, 16, 0, 3},
	{FUSE_INIT, 0, 0, 0, 15, 0, 0},
};

static void make_malformed(struct world *w, const struct malformed *m)
{
	static uint8_t args[40 + 8192];

	if (m->opcode == FUSE_FALLOCATE)
		*(struct fuse_fallocate_in *)args = (struct fuse_fallocate_in){
			.offset = m->offset,
			.length = m->size,
			.mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE};
	else
		*(struct fuse_write_in *)args =
			(struct fuse_write_in){.offset = m->offset, .size = m->size};
	make(w, m->opcode, m->node, args, m->sent_bytes);
	sent.in.len += (uint32_t)m->len_off;
	sent.in.total_extlen = m->extensions;
}

static void test_malformed_requests_are_refused_and_counted(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	fill(pattern, 0, 8192, 1);
	assert_int_equal(write_at(&w, 0, 8192, pattern), 8192);
	for (uint32_t i = 0; i < ARRAY_SIZE(malformed); i++) {
		make_malformed(&w, &malformed[i]);
		assert_int_equal(ask(&w), -EINVAL);
		assert_int_equal(invalid_io(&w), i + 1);
	}
	assert_int_equal(read_at(&w, 0, 8192), 8192);
	assert_memory_equal(content(), pattern, 8192);
	assert_false(readable(w.python, 20));
	stop(&w);
}

static void test_what_cannot_be_answered_is_counted_only(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	make(&w, FUSE_GETATTR, OTHER, NULL, 0);
	sent.bytes -= 8; /* not even a header */
	post(&w);
	make(&w, FUSE_FORGET, OTHER, pattern, 8);
	sent.in.len++;
	post(&w);
	make_read(&w, UINT64_MAX, 4096);
	sent.in.unique = 0; /* its answer would be a notification */
	post(&w);
	make_read(&w, 0, 4096);
	sent.in.unique = 0;
	post(&w);
	assert_int_equal(read_at(&w, 0, 4096), 4096);
	assert_int_equal(invalid_io(&w), 3);
	assert_false(readable(w.kernel, 20));
	stop(&w);
}

/* A write that fails is tried again as an error, so that no task hangs. */
static void test_undeliverable_replies_become_eio(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	make_read(&w, 0, 4096);
	/* The relay's eventfd is not written to here, so the reply is the first write. */
	atomic_store(&write_pass, 0);
	assert_int_equal(ask(&w), -EIO);
	fill(pattern, 0, 4096, 3);
	make_write(&w, 0, 4096, pattern);
	atomic_store(&write_pass, 0);
	assert_int_equal(ask(&w), -EIO);
	assert_int_equal(read_at(&w, 0, 4096), 4096);
	assert_memory_equal(content(), pattern, 4096);
	stop(&w);
}

/* The loop device takes a short count for success. */
static void test_partly_stored_write_is_an_error(void **state)
{
	uint64_t stored = 0;
	struct store_stats stats;
	struct world w;
	int64_t rv;

	(void)state;
	start_with(&w, 2, 2 << 20);
	srand(1);
	for (uint32_t i = 0; i < REQUEST_BYTES; i++)
		pattern[i] = (uint8_t)rand();
	do {
		rv = write_at(&w, stored, REQUEST_BYTES, pattern);
		if (rv > 0)
			stored += (uint64_t)rv;
	} while (rv > 0 && stored < FILE_BYTES - REQUEST_BYTES);
	assert_int_equal(rv, -ENOSPC);
	store_get_stats(w.store, &stats);
	assert_true(stats.pages_stored * PAGE_BYTES > stored);
	/* What was stored before is there, and space that is freed can be used again. */
	assert_int_equal(read_at(&w, stored - REQUEST_BYTES, REQUEST_BYTES), REQUEST_BYTES);
	assert_memory_equal(content(), pattern, REQUEST_BYTES);
	make_fallocate(&w, SWAP, 0, stored, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
	assert_int_equal(ask(&w), 0);
	assert_int_equal(write_at(&w, stored, REQUEST_BYTES, pattern), REQUEST_BYTES);
	stop(&w);
}

/* 16 requests under way at a time, each in a part of the file of its own. */
static void test_requests_at_once_do_not_mix(void **state)
{
	enum { DEPTH = 16, ROUNDS = 400 };
	static uint8_t want[DEPTH][REQUEST_BYTES / 2];
	const uint64_t part = FILE_BYTES / DEPTH;
	struct {
		uint64_t unique;
		uint32_t opcode, size;
	} under_way[DEPTH];
	unsigned int seed = 7;
	struct world w;

	(void)state;
	start_with(&w, 4, 0);
	memset(want, 0, sizeof(want));
	for (uint32_t round = 0; round < ROUNDS; round++) {
		for (uint32_t i = 0; i < DEPTH; i++) {
			uint32_t size = 1 + (uint32_t)rand_r(&seed) % (REQUEST_BYTES / 2);
			uint32_t dice = (uint32_t)rand_r(&seed) % 8;

			if (dice < 3) {
				fill(want[i], 0, size, round * DEPTH + i);
				make_write(&w, i * part, size, want[i]);
			} else if (dice == 3) {
				memset(want[i], 0, size);
				make_fallocate(&w, SWAP, i * part, size,
					       FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
			} else {
				make_read(&w, i * part, size);
			}
			under_way[i].unique = sent.in.unique;
			under_way[i].opcode = sent.in.opcode;
			under_way[i].size = size;
			post(&w);
		}
		for (uint32_t n = 0; n < DEPTH; n++) {
			uint32_t i = 0;

			receive(w.kernel);
			while (i < DEPTH && under_way[i].unique != got.out.unique)
				i++;
			assert_true(i < DEPTH);
			assert_int_equal(got.out.error, 0);
			under_way[i].unique = 0;
			if (under_way[i].opcode == FUSE_READ) {
				assert_int_equal(got.bytes, sizeof(got.out) + under_way[i].size);
				assert_memory_equal(content(), want[i], under_way[i].size);
			}
		}
	}
	stop(&w);
}

static void test_an_idle_switch_sleeps(void **state)
{
	struct rusage before, after;
	struct world w;
	int64_t us;

	(void)state;
	start_with(&w, 8, 0);
	assert_int_equal(read_at(&w, 0, 4096), 4096);
	usleep(20000);
	getrusage(RUSAGE_SELF, &before);
	usleep(500000);
	getrusage(RUSAGE_SELF, &after);
	us = (after.ru_utime.tv_sec - before.ru_utime.tv_sec) * 1000000 + after.ru_utime.tv_usec -
	     before.ru_utime.tv_usec;
	assert_true(us < 20000);
	assert_true(after.ru_nvcsw - before.ru_nvcsw < 20);
	stop(&w);
}

static void test_a_device_that_fails_ends_the_switch(void **state)
{
	struct world w;
	eventfd_t ends;
	int fds[2];

	(void)state;
	open_world(&w, 3, 0);
	assert_int_equal(pipe(fds), 0);
	close(w.options.fuse_fd);
	w.options.fuse_fd = fds[1]; /* cannot be read */
	assert_int_equal(switch_start(&w.sw, w.store, &w.options), 0);
	assert_int_equal(switch_join(w.sw), -EBADF);
	assert_int_equal(eventfd_read(w.options.end_fd, &ends), 0);
	close(fds[0]);
	close_world(&w);
}

static void test_senseless_options_are_refused(void **state)
{
	struct switch_options good, *o;
	struct world w;

	(void)state;
	open_world(&w, 3, 0);
	good = w.options;
	o = &w.options;
	for (int i = 0; i < 6; i++) {
		static const uint32_t bytes[] = {0, 4097, 2048, (1 << 20) + 4096};

		*o = good;
		if (i < 4)
			o->max_request_bytes = bytes[i];
		else
			o->nr_lanes = i == 4 ? 0 : 65;
		assert_int_equal(switch_start(&w.sw, w.store, o), -EINVAL);
	}
	*o = good;
	close_world(&w);
}

#ifndef HAS_TSAN
static void test_a_start_that_fails_leaves_nothing(void **state)
{
	struct world w;

	(void)state;
	open_world(&w, 3, 0);
	make_read(&w, 0, 4096);
	post(&w);
	for (int nth = 0; nth < 4; nth++) {
		eventfd_t ends;

		atomic_store(&thread_pass, nth);
		assert_int_equal(switch_start(&w.sw, w.store, &w.options), -EAGAIN);
		assert_int_equal(eventfd_read(w.options.end_fd, &ends), -1);
	}
	atomic_store(&thread_pass, -1);
	/* The request is still there for the start that works. */
	assert_int_equal(switch_start(&w.sw, w.store, &w.options), 0);
	assert_int_equal(answer(&w), 0);
	stop(&w);
}
#endif

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_reads_return_what_was_written),
		cmocka_unit_test(test_the_end_of_the_file_is_an_end),
		cmocka_unit_test(test_fallocate_frees_and_never_says_what_turns_discard_off),
		cmocka_unit_test(test_freed_pages_read_as_zeroes),
		cmocka_unit_test(test_other_files_fallocate_is_answered_here),
		cmocka_unit_test(test_fsync_is_answered_here_for_the_swap_file_only),
		cmocka_unit_test(test_interrupts_are_dropped),
		cmocka_unit_test(test_resent_requests_are_served),
		cmocka_unit_test(test_extensions_are_not_content),
		cmocka_unit_test(test_malformed_requests_are_refused_and_counted),
		cmocka_unit_test(test_what_cannot_be_answered_is_counted_only),
		cmocka_unit_test(test_undeliverable_replies_become_eio),
		cmocka_unit_test(test_partly_stored_write_is_an_error),
		cmocka_unit_test(test_requests_at_once_do_not_mix),
		cmocka_unit_test(test_an_idle_switch_sleeps),
		cmocka_unit_test(test_a_device_that_fails_ends_the_switch),
		cmocka_unit_test(test_senseless_options_are_refused),
#ifndef HAS_TSAN
		cmocka_unit_test(test_a_start_that_fails_leaves_nothing),
#endif
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
