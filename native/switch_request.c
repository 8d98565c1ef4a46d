/* SPDX-License-Identifier: MIT
 *
 * switch_request - what happens to one request; see switch.h
 */
#define _GNU_SOURCE
#include "switch.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define SHORT_BYTES (8 * PAGE_BYTES) /* about 10 us of decoding; waking a lane takes as long */
#define MAX_BACKGROUND 128	     /* the loop device's queue depth; 12 throttles it */

static const char *arguments(const char *message)
{
	return message + sizeof(struct fuse_in_header);
}

bool switch_is_long(const char *message, size_t length)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)message;

	if (length < sizeof(*in))
		return false;
	if (in->opcode == FUSE_WRITE || in->opcode == FUSE_FALLOCATE)
		return true;
	return in->opcode == FUSE_READ && length >= sizeof(*in) + sizeof(struct fuse_read_in) &&
	       ((const struct fuse_read_in *)arguments(message))->size > SHORT_BYTES;
}

/* Whatever write() says, there is nobody to tell: ENOENT is a request that the kernel gave up. */
static void send_reply(struct lane *lane, uint64_t unique, int error, size_t bytes)
{
	struct fuse_out_header *out = (struct fuse_out_header *)lane->out;
	ssize_t rv;

	out->len = (uint32_t)(sizeof(*out) + bytes);
	out->error = error;
	out->unique = unique;
	do
		rv = write(lane->sw->options.fuse_fd, out, out->len);
	while (rv < 0 && errno == EINTR);
}

static int serve_read(struct lane *lane, const struct fuse_read_in *in, size_t *bytes)
{
	int64_t rv;

	if (in->size > lane->sw->options.max_request_bytes) {
		store_note_invalid(lane->sw->store);
		return -EINVAL;
	}
	rv = store_pread(lane->sw->store, in->offset, in->size,
			 lane->out + sizeof(struct fuse_out_header));
	if (rv < 0)
		return (int)rv;
	*bytes = (size_t)rv;
	return 0;
}

static int serve_write(struct lane *lane, const struct fuse_write_in *in, size_t content,
		       size_t *bytes)
{
	struct fuse_write_out *out =
		(struct fuse_write_out *)(lane->out + sizeof(struct fuse_out_header));
	int64_t rv;

	if (in->size != content) {
		store_note_invalid(lane->sw->store);
		return -EINVAL;
	}
	rv = store_pwrite(lane->sw->store, in->offset, in->size, in + 1);
	if (rv < 0)
		return (int)rv;
	*out = (struct fuse_write_out){.size = (uint32_t)rv};
	*bytes = sizeof(*out);
	return 0;
}

/* PUNCH_HOLE and ZERO_RANGE must never be EOPNOTSUPP: the loop device would drop discard for
 * good. The other modes may, and nothing of ours uses them. */
static int serve_fallocate(struct lane *lane, const struct fuse_fallocate_in *in)
{
	uint64_t size = lane->sw->store->nr_pages * PAGE_BYTES;

	if (!(in->mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)))
		return -EOPNOTSUPP;
	if (!(in->mode & FALLOC_FL_KEEP_SIZE) &&
	    (in->offset > size || in->length > size - in->offset)) {
		store_note_invalid(lane->sw->store);
		return -EFBIG;
	}
	return store_punch(lane->sw->store, in->offset, in->length);
}

/* Return: 0 or -errno, or 1: not a page request. */
static int serve_page(struct lane *lane, const struct fuse_in_header *in, size_t length,
		      size_t *bytes)
{
	const char *args = arguments((const char *)in);
	size_t size = length - sizeof(*in);
	size_t least = 0;

	switch (in->opcode) {
	case FUSE_READ:
		least = sizeof(struct fuse_read_in);
		if (size >= least)
			return serve_read(lane, (const struct fuse_read_in *)args, bytes);
		break;
	case FUSE_WRITE:
		least = sizeof(struct fuse_write_in);
		if (size >= least)
			return serve_write(lane, (const struct fuse_write_in *)args, size - least,
					   bytes);
		break;
	case FUSE_FALLOCATE:
		least = sizeof(struct fuse_fallocate_in);
		if (size >= least)
			return serve_fallocate(lane, (const struct fuse_fallocate_in *)args);
		break;
	case FUSE_FSYNC:
		return 0;
	default:
		return 1;
	}
	store_note_invalid(lane->sw->store);
	return -EINVAL;
}

static void ring_copy_in(struct backlog *b, const void *bytes, size_t nr)
{
	size_t at = (b->head + b->used) % BACKLOG_BYTES;
	size_t first = nr < BACKLOG_BYTES - at ? nr : BACKLOG_BYTES - at;

	memcpy(b->ring + at, bytes, first);
	memcpy(b->ring, (const char *)bytes + first, nr - first);
	b->used += nr;
}

static void ring_copy_out(struct backlog *b, void *bytes, size_t nr)
{
	size_t first = nr < BACKLOG_BYTES - b->head ? nr : BACKLOG_BYTES - b->head;

	memcpy(bytes, b->ring + b->head, first);
	memcpy((char *)bytes + first, b->ring, nr - first);
	b->head = (b->head + nr) % BACKLOG_BYTES;
	b->used -= nr;
}

/* Return: 0, -EAGAIN (full). */
static int backlog_add(struct fuse_switch *sw, const void *message, size_t length)
{
	struct backlog *b = &sw->backlog;
	uint32_t nr = (uint32_t)length;
	int rv = 0;

	pthread_mutex_lock(&b->lock);
	if (BACKLOG_BYTES - b->used < length + sizeof(nr)) {
		rv = -EAGAIN;
	} else {
		ring_copy_in(b, &nr, sizeof(nr));
		ring_copy_in(b, message, length);
		atomic_store(&b->filled, true);
	}
	pthread_mutex_unlock(&b->lock);
	if (!rv)
		eventfd_write(sw->wake_fd, 1);
	return rv;
}

bool backlog_send(struct fuse_switch *sw)
{
	struct backlog *b = &sw->backlog;
	bool full = false;

	pthread_mutex_lock(&b->lock);
	while (b->used && !full) {
		size_t head = b->head, used = b->used;
		uint32_t nr;

		ring_copy_out(b, &nr, sizeof(nr));
		ring_copy_out(b, sw->relay_buffer, nr);
		if (send(sw->options.socket_fd, sw->relay_buffer, nr, MSG_DONTWAIT | MSG_NOSIGNAL) <
			    0 &&
		    (errno == EAGAIN || errno == EINTR || errno == ENOBUFS)) {
			b->head = head;
			b->used = used;
			full = true;
		}
	}
	atomic_store(&b->filled, b->used != 0);
	pthread_mutex_unlock(&b->lock);
	return full;
}

static void note_init(struct fuse_switch *sw, const struct fuse_in_header *in, size_t length)
{
	const struct fuse_init_in *init = (const struct fuse_init_in *)arguments((const char *)in);

	if (length < sizeof(*in) + offsetof(struct fuse_init_in, flags2))
		return;
	atomic_store(&sw->init_flags, init->flags);
	atomic_store(&sw->init_unique, in->unique);
}

/* Return: 0, or -errno for the kernel. */
static int forward(struct fuse_switch *sw, const char *message, size_t length)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)message;

	if (in->opcode == FUSE_INIT)
		note_init(sw, in, length);
	/* Once something waits, all that follows waits behind it. */
	if (atomic_load(&sw->backlog.filled))
		return backlog_add(sw, message, length);
	if (send(sw->options.socket_fd, message, length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
		return 0;
	if (errno == EAGAIN || errno == EINTR || errno == ENOBUFS)
		return backlog_add(sw, message, length);
	return -EIO;
}

static bool wants_reply(uint32_t opcode)
{
	return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET;
}

void switch_serve(struct lane *lane, size_t length)
{
	struct fuse_switch *sw = lane->sw;
	const struct fuse_in_header *in = (const struct fuse_in_header *)lane->in;
	size_t bytes = 0;
	int rv = 1;

	if (length < sizeof(*in)) {
		store_note_invalid(sw->store);
		return;
	}
	/* Page requests never wait, and libfuse would remember it for a request it never saw. */
	if (in->opcode == FUSE_INTERRUPT)
		return;
	if (in->len != length) {
		store_note_invalid(sw->store);
		rv = -EINVAL;
	} else if (in->nodeid == sw->options.swap_inode) {
		rv = serve_page(lane, in, length, &bytes);
	} else if (in->opcode == FUSE_FALLOCATE) {
		/* libfuse would say ENOSYS, which turns fallocate off for the swap file too. */
		rv = -EOPNOTSUPP;
	}
	if (rv == 1) {
		rv = forward(sw, lane->in, length);
		if (!rv)
			return;
	}
	if (wants_reply(in->opcode))
		send_reply(lane, in->unique, rv, rv ? 0 : bytes);
}

size_t switch_change_init(const struct fuse_switch *sw, char *reply, size_t length)
{
	struct fuse_out_header *out = (struct fuse_out_header *)reply;
	struct fuse_init_out *init = (struct fuse_init_out *)(reply + sizeof(*out));
	uint32_t offered = atomic_load(&sw->init_flags);
	uint32_t request = sw->options.max_request_bytes;

	if (out->error || length < sizeof(*out) + offsetof(struct fuse_init_out, time_gran))
		return length;
	if (length < sizeof(*out) + sizeof(*init))
		memset(reply + length, 0, sizeof(*out) + sizeof(*init) - length);
	init->max_background = MAX_BACKGROUND;
	init->congestion_threshold = MAX_BACKGROUND * 3 / 4;
	init->max_write = request;
	/* Truncation arrives as SETATTR, where it is refused; nothing of the file is cached. */
	init->flags &= (uint32_t) ~(FUSE_ATOMIC_O_TRUNC | FUSE_WRITEBACK_CACHE);
	init->flags |= offered & (FUSE_ASYNC_DIO | FUSE_MAX_PAGES | FUSE_BIG_WRITES);
	if (init->flags & FUSE_MAX_PAGES)
		init->max_pages = (uint16_t)(request / PAGE_BYTES);
	out->len = (uint32_t)(sizeof(*out) + sizeof(*init));
	return out->len;
}
