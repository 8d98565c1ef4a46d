/* SPDX-License-Identifier: MIT
 *
 * Tests of the switch: a SOCK_SEQPACKET pair stands for /dev/fuse, the test is the kernel on its
 * one side and pyfuse3 at the end of the other pair. The store is the real one.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "switch.h"

#define NR_PAGES 1024ULL
#define FILE_BYTES (NR_PAGES * PAGE_BYTES)
#define REQUEST_BYTES (128U << 10)
#define MESSAGE_BYTES (REQUEST_BYTES + 8192)
#define SWAP 2
#define OTHER 3
#define ARRAY_SIZE(array) (sizeof(array) / sizeof(*(array)))

#if defined(__SANITIZE_THREAD__)
#define HAS_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HAS_TSAN 1
#endif
#endif

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

struct world {
	struct store *store;
	int region_fd;
	int kernel; /* our end of 'the device' */
	int python; /* our end of the socket */
	struct switch_options options;
	struct fuse_switch *sw;
	uint64_t unique;
};

/* A message in either direction. */
struct message {
	size_t bytes;
	union {
		struct fuse_in_header in;
		struct fuse_out_header out;
		uint8_t raw[MESSAGE_BYTES];
	};
};

static struct message sent, got;

static void pair_of_sockets(int fds[2])
{
	int bytes = 1 << 20;

	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
	for (int i = 0; i < 2; i++)
		setsockopt(fds[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

static void open_world(struct world *w, uint32_t nr_lanes, uint64_t mem_limit)
{
	struct store_options options = {.nr_pages = NR_PAGES,
					.mem_limit = mem_limit,
					.reserve_bytes = 1 << 20,
					.chunk_bytes = STORE_MAX_CHUNK_BYTES};
	uint32_t flags;
	int fds[2];

	*w = (struct world){.unique = 100};
	w->region_fd = region_memory(&flags);
	assert_true(w->region_fd >= 0);
	assert_int_equal(store_create(&w->store, w->region_fd, &options), 0);
	w->options = (struct switch_options){.nr_lanes = nr_lanes,
					     .spin_us = 50,
					     .max_request_bytes = REQUEST_BYTES,
					     .swap_inode = SWAP};
	pair_of_sockets(fds);
	w->kernel = fds[0];
	w->options.fuse_fd = fds[1];
	fcntl(fds[1], F_SETFL, O_RDWR | O_NONBLOCK);
	pair_of_sockets(fds);
	w->python = fds[0];
	w->options.socket_fd = fds[1];
	w->options.end_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

static void close_world(struct world *w)
{
	store_destroy(w->store);
	close(w->region_fd);
	close(w->kernel);
	close(w->python);
	close(w->options.fuse_fd);
	close(w->options.socket_fd);
	close(w->options.end_fd);
}

static void start_with(struct world *w, uint32_t nr_lanes, uint64_t mem_limit)
{
	open_world(w, nr_lanes, mem_limit);
	assert_int_equal(switch_start(&w->sw, w->store, &w->options), 0);
}

static void start(struct world *w)
{
	start_with(w, 3, 0);
}

/* Unmount, and see that the switch ends as it should. */
static void stop(struct world *w)
{
	char fault[160];
	eventfd_t ends = 0;

	shutdown(w->kernel, SHUT_WR);
	assert_int_equal(switch_join(w->sw), 0);
	assert_int_equal(eventfd_read(w->options.end_fd, &ends), 0);
	assert_int_equal(ends, 1);
	assert_int_equal(store_check(w->store, fault), 0);
	close_world(w);
}

static uint64_t invalid_io(const struct world *w)
{
	struct store_stats stats;

	store_get_stats(w->store, &stats);
	return stats.invalid_io;
}

static bool readable(int fd, int ms)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLIN};

	return poll(&poll_fd, 1, ms) == 1 && poll_fd.revents & POLLIN;
}

/* A request into 'sent'; its header may be changed before it goes. */
static void make(struct world *w, uint32_t opcode, uint64_t node, const void *args, size_t nr)
{
	sent.bytes = sizeof(sent.in) + nr;
	sent.in = (struct fuse_in_header){.len = (uint32_t)sent.bytes,
					  .opcode = opcode,
					  .unique = w->unique++,
					  .nodeid = node};
	if (nr)
		memcpy(sent.raw + sizeof(sent.in), args, nr);
}

static void add(const void *bytes, size_t nr)
{
	memcpy(sent.raw + sent.bytes, bytes, nr);
	sent.bytes += nr;
	sent.in.len = (uint32_t)sent.bytes;
}

static void post(const struct world *w)
{
	assert_int_equal(send(w->kernel, sent.raw, sent.bytes, 0), sent.bytes);
}

static void receive(int fd)
{
	ssize_t n;

	assert_true(readable(fd, 10000));
	n = recv(fd, got.raw, sizeof(got.raw), 0);
	assert_true(n > 0);
	got.bytes = (size_t)n;
	assert_int_equal(got.out.len, n);
}

/* Return: the error of the answer to what was just sent. */
static int answer(const struct world *w)
{
	receive(w->kernel);
	assert_int_equal(got.out.unique, sent.in.unique);
	if (got.out.error)
		assert_int_equal(got.bytes, sizeof(got.out));
	return got.out.error;
}

static int ask(const struct world *w)
{
	post(w);
	return answer(w);
}

static void make_read(struct world *w, uint64_t offset, uint32_t size)
{
	struct fuse_read_in in = {.offset = offset, .size = size};

	make(w, FUSE_READ, SWAP, &in, sizeof(in));
}

static void make_write(struct world *w, uint64_t offset, uint32_t size, const void *bytes)
{
	struct fuse_write_in in = {.offset = offset, .size = size};

	make(w, FUSE_WRITE, SWAP, &in, sizeof(in));
	add(bytes, size);
}

static void make_fallocate(struct world *w, uint64_t node, uint64_t offset, uint64_t length,
			   uint32_t mode)
{
	struct fuse_fallocate_in in = {.offset = offset, .length = length, .mode = mode};

	make(w, FUSE_FALLOCATE, node, &in, sizeof(in));
}

/* Return: bytes written, or -errno. */
static int64_t write_at(struct world *w, uint64_t offset, uint32_t size, const void *bytes)
{
	struct fuse_write_out out;
	int rv;

	make_write(w, offset, size, bytes);
	rv = ask(w);
	if (rv)
		return rv;
	assert_int_equal(got.bytes, sizeof(got.out) + sizeof(out));
	memcpy(&out, got.raw + sizeof(got.out), sizeof(out));
	return out.size;
}

/* Return: bytes read, at got.raw + 16, or -errno. */
static int64_t read_at(struct world *w, uint64_t offset, uint32_t size)
{
	int rv;

	make_read(w, offset, size);
	rv = ask(w);
	return rv ? rv : (int64_t)(got.bytes - sizeof(got.out));
}

static const uint8_t *content(void)
{
	return got.raw + sizeof(got.out);
}

/* Bytes that say where they belong; half noise, so that a page needs a block. */
static void fill(uint8_t *bytes, uint64_t offset, uint32_t size, uint32_t version)
{
	for (uint32_t i = 0; i < size; i++) {
		uint64_t at = offset + i;
		uint64_t x = (at / 8 + version) * 0x9e3779b97f4a7c15ULL;

		bytes[i] = at % PAGE_BYTES < PAGE_BYTES / 2 ? (uint8_t)(x >> (at % 8 * 8))
							    : (uint8_t)(version + at / PAGE_BYTES);
	}
}

static uint8_t pattern[REQUEST_BYTES];

static void reads_return_what_was_written(void **state)
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

static void the_end_of_the_file_is_an_end(void **state)
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

static void fallocate_frees_and_never_says_what_turns_discard_off(void **state)
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

static void freed_pages_read_as_zeroes(void **state)
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

static void other_files_fallocate_is_answered_here(void **state)
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

static void fsync_is_answered_here_for_the_swap_file_only(void **state)
{
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
	stop(&w);
}

static void interrupts_are_dropped(void **state)
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
static void resent_requests_are_served(void **state)
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
static void extensions_are_not_content(void **state)
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

/* Each makes one malformed message. */
static void unequal_length(struct world *w)
{
	make_read(w, 0, 4096);
	sent.in.len--;
}

static void longer_than_read(struct world *w)
{
	make_read(w, 0, 4096);
	sent.in.len += 4096;
}

static void read_cut_short(struct world *w)
{
	make_read(w, 0, 4096);
	sent.bytes -= 8;
	sent.in.len = (uint32_t)sent.bytes;
}

static void read_too_long(struct world *w)
{
	make_read(w, 0, REQUEST_BYTES + 1);
}

static void read_of_four_gib(struct world *w)
{
	make_read(w, 0, UINT32_MAX);
}

static void read_past_loff_t(struct world *w)
{
	make_read(w, INT64_MAX - 4095, 4097);
}

static void read_at_minus_one(struct world *w)
{
	make_read(w, UINT64_MAX, 4096);
}

static void write_past_loff_t(struct world *w)
{
	make_write(w, INT64_MAX, 4096, pattern);
}

static void write_wraps_around(struct world *w)
{
	make_write(w, UINT64_MAX - 4095, 8192, pattern);
}

static void write_without_content(struct world *w)
{
	struct fuse_write_in in = {.size = 4096};

	make(w, FUSE_WRITE, SWAP, &in, sizeof(in));
}

static void write_with_too_much_content(struct world *w)
{
	make_write(w, 0, 4096, pattern);
	add(pattern, 1);
}

static void write_without_arguments(struct world *w)
{
	make(w, FUSE_WRITE, SWAP, NULL, 0);
}

static void fallocate_cut_short(struct world *w)
{
	make_fallocate(w, SWAP, 0, 4096, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
	sent.bytes -= 1;
	sent.in.len = (uint32_t)sent.bytes;
}

static void fsync_without_arguments(struct world *w)
{
	make(w, FUSE_FSYNC, SWAP, NULL, 0);
}

static void extension_longer_than_message(struct world *w)
{
	make_read(w, 0, 4096);
	sent.in.total_extlen = UINT16_MAX;
}

static void extension_eats_arguments(struct world *w)
{
	make_read(w, 0, 4096);
	sent.in.total_extlen = 1;
}

static void other_of_unequal_length(struct world *w)
{
	make(w, FUSE_GETATTR, OTHER, pattern, 16);
	sent.in.len++;
}

static void init_cut_short(struct world *w)
{
	make(w, FUSE_INIT, 0, pattern, 8);
}

static void malformed_requests_are_refused_and_counted(void **state)
{
	static void (*const make_one[])(struct world *) = {
		unequal_length,
		longer_than_read,
		read_cut_short,
		read_too_long,
		read_of_four_gib,
		read_past_loff_t,
		read_at_minus_one,
		write_past_loff_t,
		write_wraps_around,
		write_without_content,
		write_with_too_much_content,
		write_without_arguments,
		fallocate_cut_short,
		fsync_without_arguments,
		extension_longer_than_message,
		extension_eats_arguments,
		other_of_unequal_length,
		init_cut_short,
	};
	struct world w;

	(void)state;
	start(&w);
	fill(pattern, 0, 8192, 1);
	assert_int_equal(write_at(&w, 0, 8192, pattern), 8192);
	for (uint32_t i = 0; i < ARRAY_SIZE(make_one); i++) {
		make_one[i](&w);
		assert_int_equal(ask(&w), -EINVAL);
		assert_int_equal(invalid_io(&w), i + 1);
	}
	assert_int_equal(read_at(&w, 0, 8192), 8192);
	assert_memory_equal(content(), pattern, 8192);
	assert_false(readable(w.python, 20));
	stop(&w);
}

static void what_cannot_be_answered_is_counted_only(void **state)
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

static void other_requests_reach_pyfuse3_as_they_are(void **state)
{
	static const uint32_t opcodes[] = {FUSE_LOOKUP,	 FUSE_FORGET,
					   FUSE_GETATTR, FUSE_SETATTR,
					   FUSE_OPEN,	 FUSE_READ,
					   FUSE_WRITE,	 FUSE_STATFS,
					   FUSE_RELEASE, FUSE_FLUSH,
					   FUSE_FSYNC,	 FUSE_OPENDIR,
					   FUSE_READDIR, FUSE_BATCH_FORGET,
					   FUSE_DESTROY, FUSE_IOCTL,
					   FUSE_LSEEK,	 FUSE_COPY_FILE_RANGE,
					   52,		 4096,
					   UINT32_MAX};
	struct world w;

	(void)state;
	start(&w);
	for (uint32_t i = 0; i < ARRAY_SIZE(opcodes); i++) {
		fill(pattern, i, 1000 + i, i);
		make(&w, opcodes[i], OTHER, pattern, 1000 + i);
		post(&w);
		receive(w.python);
		assert_int_equal(got.bytes, sent.bytes);
		assert_memory_equal(got.raw, sent.raw, sent.bytes);
	}
	/* Of the swap file, all but page I/O. */
	make(&w, FUSE_GETATTR, SWAP, pattern, 16);
	post(&w);
	receive(w.python);
	assert_memory_equal(got.raw, sent.raw, sent.bytes);
	assert_int_equal(invalid_io(&w), 0);
	stop(&w);
}

static void reply_of(uint64_t unique, int error, const void *bytes, size_t nr)
{
	sent.bytes = sizeof(sent.out) + nr;
	sent.out = (struct fuse_out_header){
		.len = (uint32_t)sent.bytes, .error = error, .unique = unique};
	if (nr)
		memcpy(sent.raw + sizeof(sent.out), bytes, nr);
}

static void replies_of_pyfuse3_reach_the_kernel_as_they_are(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	for (uint32_t i = 0; i < 20; i++) {
		uint32_t nr = i == 19 ? REQUEST_BYTES : i * 500;

		fill(pattern, i, nr, i);
		reply_of(1000 + i, i % 3 ? 0 : -ENOENT, pattern, nr);
		if (i == 7)
			reply_of(0, 2 /* a notification */, pattern, nr);
		assert_int_equal(send(w.python, sent.raw, sent.bytes, 0), sent.bytes);
		receive(w.kernel);
		assert_int_equal(got.bytes, sent.bytes);
		assert_memory_equal(got.raw, sent.raw, sent.bytes);
	}
	stop(&w);
}

static void broken_replies_of_pyfuse3_become_eio(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	reply_of(1001, 0, pattern, 100);
	sent.out.len++;
	send(w.python, sent.raw, sent.bytes, 0);
	sent.in.unique = 1001;
	assert_int_equal(answer(&w), -EIO);
	reply_of(1002, 0, pattern, REQUEST_BYTES); /* longer than any buffer here */
	sent.bytes = sent.out.len = MESSAGE_BYTES;
	send(w.python, sent.raw, sent.bytes, 0);
	sent.in.unique = 1002;
	assert_int_equal(answer(&w), -EIO);
	send(w.python, "short", 5, 0);
	assert_int_equal(read_at(&w, 0, 4096), 4096);
	assert_false(readable(w.kernel, 20));
	stop(&w);
}

/* A write that fails is tried again as an error, so that no task hangs. */
static void undeliverable_replies_become_eio(void **state)
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

#define OFFERED                                                                                    \
	(FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_ASYNC_DIO |                \
	 FUSE_WRITEBACK_CACHE | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_INIT_EXT)

static struct fuse_init_out *init_of(uint8_t *reply)
{
	return (struct fuse_init_out *)(reply + sizeof(struct fuse_out_header));
}

static size_t make_init_reply(uint8_t *reply, uint32_t flags, size_t bytes)
{
	struct fuse_out_header *out = (struct fuse_out_header *)reply;

	memset(reply, 0xa5, INIT_REPLY_BYTES);
	*out = (struct fuse_out_header){.len = (uint32_t)(sizeof(*out) + bytes), .unique = 5};
	*init_of(reply) = (struct fuse_init_out){.major = 7,
						 .minor = 31,
						 .max_readahead = 131072,
						 .flags = flags,
						 .max_write = 1 << 20,
						 .time_gran = 1,
						 .flags2 = 0xffff};
	return out->len;
}

static void init_reply_gets_our_limits(void **state)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));
	struct fuse_init_out *init = init_of(reply);
	size_t bytes = make_init_reply(reply, OFFERED, sizeof(*init));

	(void)state;
	assert_int_equal(init_rewrite(reply, bytes, OFFERED, REQUEST_BYTES), INIT_REPLY_BYTES);
	assert_int_equal(init->major, 7);
	assert_int_equal(init->minor, 31);
	assert_int_equal(init->max_readahead, 131072);
	assert_int_equal(init->time_gran, 1);
	assert_int_equal(init->max_write, REQUEST_BYTES);
	assert_int_equal(init->max_pages, REQUEST_BYTES / 4096);
	assert_int_equal(init->max_background, 128);
	assert_int_equal(init->congestion_threshold, 96);
	assert_int_equal(init->flags, FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO |
					      FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES);
	assert_int_equal(init->flags2, 0);
}

static void init_reply_asks_only_for_what_is_offered(void **state)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));
	size_t bytes = make_init_reply(reply, UINT32_MAX, sizeof(struct fuse_init_out));

	(void)state;
	init_rewrite(reply, bytes, FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC, REQUEST_BYTES);
	assert_int_equal(init_of(reply)->flags, FUSE_ASYNC_READ);
}

/* Older libraries send 24 bytes; what they leave out is zero, not what was in the buffer. */
static void short_init_reply_is_made_whole(void **state)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));
	struct fuse_out_header *out = (struct fuse_out_header *)reply;

	(void)state;
	for (size_t bytes = 8; bytes < sizeof(struct fuse_init_out); bytes += 4) {
		make_init_reply(reply, 0, bytes);
		memset(reply + sizeof(*out) + bytes, 0x77, INIT_REPLY_BYTES - sizeof(*out) - bytes);
		assert_int_equal(init_rewrite(reply, out->len, OFFERED, REQUEST_BYTES),
				 INIT_REPLY_BYTES);
		assert_int_equal(out->len, INIT_REPLY_BYTES);
		assert_int_equal(init_of(reply)->max_write, REQUEST_BYTES);
		assert_int_equal(init_of(reply)->unused[6], 0);
		assert_int_equal(init_of(reply)->time_gran, bytes >= 28);
	}
}

static void strange_init_replies_are_left_alone(void **state)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));
	uint8_t before[INIT_REPLY_BYTES];
	struct fuse_out_header *out = (struct fuse_out_header *)reply;

	(void)state;
	for (int i = 0; i < 3; i++) {
		size_t bytes = make_init_reply(reply, OFFERED, sizeof(struct fuse_init_out));

		if (i == 0)
			out->error = -EPROTO;
		else if (i == 1)
			init_of(reply)->major = 8;
		else
			bytes = sizeof(*out) + 4;
		memcpy(before, reply, sizeof(before));
		assert_int_equal(init_rewrite(reply, bytes, OFFERED, REQUEST_BYTES), bytes);
		assert_memory_equal(before, reply, sizeof(before));
	}
}

static void make_init(struct world *w)
{
	struct fuse_init_in in = {.major = 7, .minor = 45, .flags = OFFERED, .flags2 = 0xfff};

	make(w, FUSE_INIT, 0, &in, sizeof(in));
}

/* pyfuse3 answers what it has just received. */
static void answer_init(struct world *w, int error)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));

	receive(w->python);
	assert_memory_equal(got.raw, sent.raw, sent.bytes);
	make_init_reply(reply, OFFERED, sizeof(struct fuse_init_out));
	if (error)
		reply_of(got.in.unique, error, NULL, 0);
	else
		reply_of(got.in.unique, 0, init_of(reply), sizeof(struct fuse_init_out));
	send(w->python, sent.raw, sent.bytes, 0);
}

static void init_makes_the_switch_ready(void **state)
{
	struct world w;
	uint64_t unique;

	(void)state;
	start(&w);
	make_init(&w);
	unique = sent.in.unique;
	post(&w);
	assert_false(switch_ready(w.sw));
	answer_init(&w, 0);
	receive(w.kernel);
	assert_int_equal(got.out.unique, unique);
	assert_int_equal(init_of(got.raw)->max_background, 128);
	for (int i = 0; !switch_ready(w.sw) && i < 1000; i++)
		usleep(1000);
	assert_true(switch_ready(w.sw));
	/* What a later worker will need. */
	assert_int_equal(w.sw->init_bytes, sizeof(struct fuse_in_header) + 64);
	/* A second one is not this kernel's; a reply with its unique is no INIT's any more. */
	make_init(&w);
	assert_int_equal(ask(&w), -EINVAL);
	reply_of(unique, 0, pattern, 64);
	send(w.python, sent.raw, sent.bytes, 0);
	receive(w.kernel);
	assert_memory_equal(got.raw, sent.raw, sent.bytes);
	stop(&w);
}

static void refused_init_does_not_make_it_ready(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	make_init(&w);
	post(&w);
	answer_init(&w, -EPROTO);
	receive(w.kernel);
	assert_int_equal(got.out.error, -EPROTO);
	usleep(10000);
	assert_false(switch_ready(w.sw));
	stop(&w);
}

/* Requests for pyfuse3 until one is refused. Return: how many were taken. */
static uint32_t fill_up(struct world *w, uint64_t *first)
{
	uint32_t nr = 0;

	*first = w->unique;
	for (;;) {
		make(w, FUSE_GETATTR, OTHER, pattern, 997);
		post(w);
		/* A page request behind it: when that is answered, this one was decided. */
		make_read(w, 0, 4096);
		post(w);
		receive(w->kernel);
		if (got.out.error == -EAGAIN) {
			assert_int_equal(got.out.unique, sent.in.unique - 1);
			assert_int_equal(answer(w), 0);
			return nr;
		}
		assert_int_equal(got.out.unique, sent.in.unique);
		assert_int_equal(got.out.error, 0);
		nr++;
		assert_true(nr < 100000);
	}
}

static void pages_go_on_while_pyfuse3_does_not_read(void **state)
{
	struct world w;
	uint64_t first;
	uint32_t nr;

	(void)state;
	start(&w);
	nr = fill_up(&w, &first);
	assert_true(nr > (1 << 20) / 1100);
	/* FORGET wants no answer and gets none; page I/O is as ever. */
	make(&w, FUSE_FORGET, OTHER, pattern, 997);
	post(&w);
	fill(pattern, 0, REQUEST_BYTES, 9);
	assert_int_equal(write_at(&w, 0, REQUEST_BYTES, pattern), REQUEST_BYTES);
	assert_int_equal(read_at(&w, 0, REQUEST_BYTES), REQUEST_BYTES);
	assert_memory_equal(content(), pattern, REQUEST_BYTES);
	make(&w, FUSE_GETATTR, OTHER, NULL, 0);
	make_fallocate(&w, SWAP, 0, 4096, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
	assert_int_equal(ask(&w), 0);
	/* It reads again: all that was taken comes, whole and in order. */
	for (uint32_t i = 0; i < nr; i++) {
		receive(w.python);
		assert_int_equal(got.bytes, sizeof(got.in) + 997);
		assert_int_equal(got.in.unique, first + 2 * i);
	}
	make(&w, FUSE_STATFS, OTHER, NULL, 0);
	post(&w);
	receive(w.python);
	assert_int_equal(got.in.opcode, FUSE_STATFS);
	assert_false(readable(w.python, 20));
	stop(&w);
}

static void pages_go_on_when_pyfuse3_is_gone(void **state)
{
	struct world w;
	uint64_t first;
	uint32_t nr;

	(void)state;
	start(&w);
	nr = fill_up(&w, &first);
	shutdown(w.python, SHUT_RDWR);
	/* Those that it had not received are answered; those in its socket are lost with it. */
	for (uint32_t i = 0; i < (1 << 20) / 1100; i++) {
		receive(w.kernel);
		assert_int_equal(got.out.error, -EIO);
		assert_in_range(got.out.unique, first, first + 2 * nr);
	}
	while (readable(w.kernel, 50))
		receive(w.kernel);
	make(&w, FUSE_GETATTR, OTHER, NULL, 0);
	assert_int_equal(ask(&w), -EIO);
	make(&w, FUSE_FORGET, OTHER, pattern, 8);
	post(&w);
	fill(pattern, 0, 8192, 9);
	assert_int_equal(write_at(&w, 0, 8192, pattern), 8192);
	assert_int_equal(read_at(&w, 0, 8192), 8192);
	assert_memory_equal(content(), pattern, 8192);
	assert_int_equal(invalid_io(&w), 0);
	stop(&w);
}

/* The loop device takes a short count for success. */
static void partly_stored_write_is_an_error(void **state)
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
static void requests_at_once_do_not_mix(void **state)
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

static void an_idle_switch_sleeps(void **state)
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

static void a_device_that_fails_ends_the_switch(void **state)
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

static void senseless_options_are_refused(void **state)
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
static void a_start_that_fails_leaves_nothing(void **state)
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
		cmocka_unit_test(reads_return_what_was_written),
		cmocka_unit_test(the_end_of_the_file_is_an_end),
		cmocka_unit_test(fallocate_frees_and_never_says_what_turns_discard_off),
		cmocka_unit_test(freed_pages_read_as_zeroes),
		cmocka_unit_test(other_files_fallocate_is_answered_here),
		cmocka_unit_test(fsync_is_answered_here_for_the_swap_file_only),
		cmocka_unit_test(interrupts_are_dropped),
		cmocka_unit_test(resent_requests_are_served),
		cmocka_unit_test(extensions_are_not_content),
		cmocka_unit_test(malformed_requests_are_refused_and_counted),
		cmocka_unit_test(what_cannot_be_answered_is_counted_only),
		cmocka_unit_test(other_requests_reach_pyfuse3_as_they_are),
		cmocka_unit_test(replies_of_pyfuse3_reach_the_kernel_as_they_are),
		cmocka_unit_test(broken_replies_of_pyfuse3_become_eio),
		cmocka_unit_test(undeliverable_replies_become_eio),
		cmocka_unit_test(init_reply_gets_our_limits),
		cmocka_unit_test(init_reply_asks_only_for_what_is_offered),
		cmocka_unit_test(short_init_reply_is_made_whole),
		cmocka_unit_test(strange_init_replies_are_left_alone),
		cmocka_unit_test(init_makes_the_switch_ready),
		cmocka_unit_test(refused_init_does_not_make_it_ready),
		cmocka_unit_test(pages_go_on_while_pyfuse3_does_not_read),
		cmocka_unit_test(pages_go_on_when_pyfuse3_is_gone),
		cmocka_unit_test(partly_stored_write_is_an_error),
		cmocka_unit_test(requests_at_once_do_not_mix),
		cmocka_unit_test(an_idle_switch_sleeps),
		cmocka_unit_test(a_device_that_fails_ends_the_switch),
		cmocka_unit_test(senseless_options_are_refused),
#ifndef HAS_TSAN
		cmocka_unit_test(a_start_that_fails_leaves_nothing),
#endif
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
