/* SPDX-License-Identifier: MIT
 *
 * fake_kernel - what tests of the switch share: a SOCK_SEQPACKET pair stands for /dev/fuse, the
 * test is the kernel on its one side and pyfuse3 at the end of the other pair. The store is real.
 */
#ifndef FAKE_KERNEL_H
#define FAKE_KERNEL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "switch.h"

#if defined(__SANITIZE_THREAD__)
#define HAS_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HAS_TSAN 1
#endif
#endif

#define NR_PAGES 1024ULL
#define FILE_BYTES (NR_PAGES * PAGE_BYTES)
#define REQUEST_BYTES (128U << 10)
#define MESSAGE_BYTES (REQUEST_BYTES + 8192)
#define SWAP 2
#define OTHER 3
#define ARRAY_SIZE(array) (sizeof(array) / sizeof(*(array)))

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

static inline void pair_of_sockets(int fds[2])
{
	int bytes = 1 << 20;

	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
	for (int i = 0; i < 2; i++)
		setsockopt(fds[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

/* Both pairs and the eventfd, for w->options. */
static inline void pair_of_devices(struct world *w)
{
	int fds[2];

	pair_of_sockets(fds);
	w->kernel = fds[0];
	w->options.fuse_fd = fds[1];
	fcntl(fds[1], F_SETFL, O_RDWR | O_NONBLOCK);
	pair_of_sockets(fds);
	w->python = fds[0];
	w->options.socket_fd = fds[1];
	w->options.end_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

static inline void open_world(struct world *w, uint32_t nr_lanes, uint64_t mem_limit)
{
	struct store_options options = {.nr_pages = NR_PAGES,
					.mem_limit = mem_limit,
					.reserve_bytes = 1 << 20,
					.chunk_bytes = STORE_MAX_CHUNK_BYTES};
	uint32_t flags;

	*w = (struct world){.unique = 100};
	w->region_fd = region_memory(&flags);
	assert_true(w->region_fd >= 0);
	assert_int_equal(store_create(&w->store, w->region_fd, &options), 0);
	w->options = (struct switch_options){.nr_lanes = nr_lanes,
					     .latency_fd = -1,
					     .spin_us = 50,
					     .max_request_bytes = REQUEST_BYTES,
					     .swap_inode = SWAP};
	pair_of_devices(w);
}

static inline void close_world(struct world *w)
{
	store_destroy(w->store);
	close(w->region_fd);
	close(w->kernel);
	close(w->python);
	close(w->options.fuse_fd);
	close(w->options.socket_fd);
	close(w->options.end_fd);
}

static inline void start_with(struct world *w, uint32_t nr_lanes, uint64_t mem_limit)
{
	open_world(w, nr_lanes, mem_limit);
	assert_int_equal(switch_start(&w->sw, w->store, &w->options), 0);
}

static inline void start(struct world *w)
{
	start_with(w, 3, 0);
}

/* Unmount, and see that the switch ends as it should. */
static inline void stop(struct world *w)
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

static inline uint64_t invalid_io(const struct world *w)
{
	struct store_stats stats;

	store_get_stats(w->store, &stats);
	return stats.invalid_io;
}

static inline bool readable(int fd, int ms)
{
	struct pollfd poll_fd = {.fd = fd, .events = POLLIN};

	return poll(&poll_fd, 1, ms) == 1 && poll_fd.revents & POLLIN;
}

/* A request into 'sent'; its header may be changed before it goes. */
static inline void make(struct world *w, uint32_t opcode, uint64_t node, const void *args,
			size_t nr)
{
	sent.bytes = sizeof(sent.in) + nr;
	sent.in = (struct fuse_in_header){.len = (uint32_t)sent.bytes,
					  .opcode = opcode,
					  .unique = w->unique++,
					  .nodeid = node};
	if (nr)
		memcpy(sent.raw + sizeof(sent.in), args, nr);
}

static inline void add(const void *bytes, size_t nr)
{
	memcpy(sent.raw + sent.bytes, bytes, nr);
	sent.bytes += nr;
	sent.in.len = (uint32_t)sent.bytes;
}

/* A reply of pyfuse3 into 'sent'. */
static inline void reply_of(uint64_t unique, int error, const void *bytes, size_t nr)
{
	sent.bytes = sizeof(sent.out) + nr;
	sent.out = (struct fuse_out_header){
		.len = (uint32_t)sent.bytes, .error = error, .unique = unique};
	if (nr)
		memcpy(sent.raw + sizeof(sent.out), bytes, nr);
}

static inline void post(const struct world *w)
{
	assert_int_equal(send(w->kernel, sent.raw, sent.bytes, 0), sent.bytes);
}

static inline void receive(int fd)
{
	ssize_t n;

	assert_true(readable(fd, 10000));
	n = recv(fd, got.raw, sizeof(got.raw), 0);
	assert_true(n > 0);
	got.bytes = (size_t)n;
	assert_int_equal(got.out.len, n);
}

/* Return: the error of the answer to what was just sent. */
static inline int answer(const struct world *w)
{
	receive(w->kernel);
	assert_int_equal(got.out.unique, sent.in.unique);
	if (got.out.error)
		assert_int_equal(got.bytes, sizeof(got.out));
	return got.out.error;
}

static inline int ask(const struct world *w)
{
	post(w);
	return answer(w);
}

static inline void make_read(struct world *w, uint64_t offset, uint32_t size)
{
	struct fuse_read_in in = {.offset = offset, .size = size};

	make(w, FUSE_READ, SWAP, &in, sizeof(in));
}

static inline void make_write(struct world *w, uint64_t offset, uint32_t size, const void *bytes)
{
	struct fuse_write_in in = {.offset = offset, .size = size};

	make(w, FUSE_WRITE, SWAP, &in, sizeof(in));
	add(bytes, size);
}

static inline void make_fallocate(struct world *w, uint64_t node, uint64_t offset, uint64_t length,
				  uint32_t mode)
{
	struct fuse_fallocate_in in = {.offset = offset, .length = length, .mode = mode};

	make(w, FUSE_FALLOCATE, node, &in, sizeof(in));
}

/* Return: bytes written, or -errno. */
static inline int64_t write_at(struct world *w, uint64_t offset, uint32_t size, const void *bytes)
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
static inline int64_t read_at(struct world *w, uint64_t offset, uint32_t size)
{
	int rv;

	make_read(w, offset, size);
	rv = ask(w);
	return rv ? rv : (int64_t)(got.bytes - sizeof(got.out));
}

static inline const uint8_t *content(void)
{
	return got.raw + sizeof(got.out);
}

/* Bytes that say where they belong; half noise, so that a page needs a block. */
static inline void fill(uint8_t *bytes, uint64_t offset, uint32_t size, uint32_t version)
{
	for (uint32_t i = 0; i < size; i++) {
		uint64_t at = offset + i;
		uint64_t x = (at / 8 + version) * 0x9e3779b97f4a7c15ULL;

		bytes[i] = at % PAGE_BYTES < PAGE_BYTES / 2 ? (uint8_t)(x >> (at % 8 * 8))
							    : (uint8_t)(version + at / PAGE_BYTES);
	}
}

static uint8_t pattern[REQUEST_BYTES];

#endif
