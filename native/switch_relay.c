/* SPDX-License-Identifier: MIT
 *
 * switch_relay - what is not page I/O: to pyfuse3 through the ring, and its replies back
 *
 * The relay is the only user of the socket. It waits for nothing but poll(): while the socket is
 * full the ring fills, and while that is full the lanes answer EAGAIN.
 */
#define _GNU_SOURCE
#include "switch.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

/*
 * Requests that the kernel may have under way; its default, 12, throttles direct I/O. 128 is the
 * loop device's queue depth.
 */
#define MAX_BACKGROUND 128

/*
 * ASYNC_DIO: requests of the loop device do not wait for one another, and a short write is an
 * error for it. The others let a request be as large as a lane's buffer.
 */
#define INIT_WANTED (FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_BIG_WRITES)

/*
 * ATOMIC_O_TRUNC: an open() that truncates would set the file's size to 0 in the kernel; without
 * it a SETATTR comes, which is refused. WRITEBACK_CACHE: swap content would wait in the page
 * cache, of all places. INIT_EXT, and with it flags2: none of those helps, and OVER_IO_URING would
 * take the page requests away from the lanes.
 */
#define INIT_UNWANTED (FUSE_ATOMIC_O_TRUNC | FUSE_WRITEBACK_CACHE | FUSE_INIT_EXT)

static uint64_t ring_align(uint64_t bytes)
{
	return (bytes + 7) & ~7ULL;
}

static bool ring_put(struct ring *ring, const uint8_t *message, size_t bytes)
{
	uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
	uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
	uint64_t at = head & (ring->size - 1);
	uint64_t first = ring->size - at < bytes ? ring->size - at : bytes;

	if (ring->size - (head - tail) < ring_align(bytes))
		return false;
	memcpy(ring->bytes + at, message, first);
	memcpy(ring->bytes, message + first, bytes - first);
	atomic_store_explicit(&ring->head, head + ring_align(bytes), memory_order_release);
	return true;
}

static void ring_copy(const struct ring *ring, uint64_t at, void *to, size_t bytes)
{
	uint64_t from = at & (ring->size - 1);
	uint64_t first = ring->size - from < bytes ? ring->size - from : bytes;

	memcpy(to, ring->bytes + from, first);
	memcpy((uint8_t *)to + first, ring->bytes, bytes - first);
}

/* The oldest message, in one piece or two. Return: its header's len; 0 when there is none. */
static uint32_t ring_front(const struct ring *ring, struct iovec iov[2])
{
	uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
	uint64_t at = tail & (ring->size - 1);
	uint32_t bytes;
	uint64_t first;

	if (atomic_load_explicit(&ring->head, memory_order_acquire) == tail)
		return 0;
	ring_copy(ring, tail, &bytes, sizeof(bytes));
	first = ring->size - at < bytes ? ring->size - at : bytes;
	iov[0] = (struct iovec){ring->bytes + at, first};
	iov[1] = (struct iovec){ring->bytes, bytes - first};
	return bytes;
}

static void ring_pop(struct ring *ring, uint32_t bytes)
{
	uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);

	atomic_store_explicit(&ring->tail, tail + ring_align(bytes), memory_order_release);
}

int relay_forward(struct fuse_switch *sw, const uint8_t *message, size_t bytes)
{
	if (atomic_load(&sw->python_gone))
		return -EIO;
	if (!ring_put(&sw->ring, message, bytes))
		return -EAGAIN;
	eventfd_write(sw->wake_fd, 1);
	return 0;
}

/* Return: 0, -EAGAIN (socket full), -errno (this message cannot be sent). */
static int send_front(struct fuse_switch *sw, struct iovec *iov)
{
	struct msghdr message = {.msg_iov = iov, .msg_iovlen = iov[1].iov_len ? 2 : 1};

	if (atomic_load(&sw->python_gone))
		return -EIO;
	while (sendmsg(sw->options.socket_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
		if (errno == EINTR)
			continue;
		if (errno == EPIPE || errno == ECONNRESET || errno == ECONNREFUSED ||
		    errno == ENOTCONN)
			atomic_store(&sw->python_gone, true);
		if (errno == EAGAIN)
			return -EAGAIN;
		return atomic_load(&sw->python_gone) ? -EIO : -errno;
	}
	return 0;
}

bool relay_send(struct fuse_switch *sw)
{
	struct iovec iov[2];
	uint32_t bytes;

	while ((bytes = ring_front(&sw->ring, iov))) {
		int rv = send_front(sw, iov);

		if (rv == -EAGAIN)
			return false;
		if (rv) {
			struct fuse_in_header in;

			ring_copy(&sw->ring, sw->ring.tail, &in, sizeof(in));
			if (request_wants_answer(in.opcode))
				switch_answer(sw, in.unique, rv);
		}
		ring_pop(&sw->ring, bytes);
	}
	return true;
}

void init_remember(struct fuse_switch *sw, const uint8_t *message, size_t bytes)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)message;
	const struct fuse_init_in *init = (const struct fuse_init_in *)(in + 1);
	uint8_t saved[JOURNAL_INIT_BYTES] __attribute__((aligned(8)));

	/* What a far kernel adds behind it, no library knows of. */
	if (bytes > sizeof(saved))
		bytes = sizeof(saved);
	memcpy(saved, message, bytes);
	((struct fuse_in_header *)saved)->len = (uint32_t)bytes;
	journal_put_init(sw->journal, saved, bytes);
	sw->init_known = true;
	sw->init_offered = init->flags;
	atomic_store(&sw->init_unique, in->unique);
}

bool init_replay(struct fuse_switch *sw)
{
	uint8_t message[JOURNAL_INIT_BYTES] __attribute__((aligned(8)));
	const struct fuse_in_header *in = (const struct fuse_in_header *)message;
	int bytes = journal_get_init(sw->journal, message);

	if (!bytes)
		return false;
	sw->init_known = sw->init_replayed = true;
	if (bytes < 0) {
		atomic_store(&sw->python_gone, true);
		atomic_store(&sw->ready, true);
		return true;
	}
	atomic_store(&sw->init_unique, in->unique);
	relay_forward(sw, message, (size_t)bytes);
	return true;
}

size_t init_rewrite(uint8_t *reply, size_t bytes, uint32_t offered, uint32_t max_request_bytes)
{
	struct fuse_out_header *out = (struct fuse_out_header *)reply;
	struct fuse_init_out *init = (struct fuse_init_out *)(out + 1);

	if (out->error || bytes < sizeof(*out) + offsetof(struct fuse_init_out, max_readahead) ||
	    init->major != FUSE_KERNEL_VERSION)
		return bytes;
	if (bytes < INIT_REPLY_BYTES) {
		memset(reply + bytes, 0, INIT_REPLY_BYTES - bytes);
		bytes = INIT_REPLY_BYTES;
	}
	init->flags = (init->flags | INIT_WANTED) & offered & ~(uint32_t)INIT_UNWANTED;
	init->flags2 = 0;
	init->max_background = MAX_BACKGROUND;
	init->congestion_threshold = MAX_BACKGROUND * 3 / 4;
	init->max_write = max_request_bytes;
	init->max_pages = (uint16_t)(max_request_bytes / PAGE_BYTES);
	out->len = (uint32_t)bytes;
	return bytes;
}

static void pass_on(struct fuse_switch *sw, size_t bytes)
{
	struct fuse_out_header *out = (struct fuse_out_header *)sw->reply;
	bool is_init = out->unique && out->unique == atomic_load(&sw->init_unique);
	bool delivered;

	if (is_init && sw->init_replayed) {
		atomic_store(&sw->init_unique, 0);
		atomic_store(&sw->ready, !out->error);
		return;
	}
	if (is_init)
		bytes = init_rewrite(sw->reply, bytes, sw->init_offered,
				     sw->options.max_request_bytes);
	if (bytes > sw->message_bytes || bytes != out->len) {
		switch_answer(sw, out->unique, -EIO);
		return;
	}
	delivered = switch_reply(sw, out);
	if (is_init) {
		atomic_store(&sw->init_unique, 0);
		if (delivered && !out->error)
			atomic_store(&sw->ready, true);
	}
}

void relay_receive(struct fuse_switch *sw)
{
	for (;;) {
		ssize_t n = recv(sw->options.socket_fd, sw->reply, sw->message_bytes,
				 MSG_DONTWAIT | MSG_TRUNC);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN)
			return;
		if (n <= 0) {
			atomic_store(&sw->python_gone, true);
			return;
		}
		if ((size_t)n >= sizeof(struct fuse_out_header))
			pass_on(sw, (size_t)n);
	}
}

void *relay_run(void *arg)
{
	struct fuse_switch *sw = arg;
	bool full = false;

	while (!atomic_load(&sw->relay_stop)) {
		struct pollfd fds[2] = {
			{.fd = sw->wake_fd, .events = POLLIN},
			{.fd = atomic_load(&sw->python_gone) ? -1 : sw->options.socket_fd,
			 .events = (short)(POLLIN | (full ? POLLOUT : 0))},
		};
		eventfd_t woken;

		poll(fds, 2, -1);
		if (fds[0].revents)
			eventfd_read(sw->wake_fd, &woken);
		if (fds[1].revents & (POLLIN | POLLHUP | POLLERR | POLLNVAL))
			relay_receive(sw);
		full = !relay_send(sw);
	}
	return NULL;
}
