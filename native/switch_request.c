/* SPDX-License-Identifier: MIT
 *
 * switch_request - what happens to one message from the kernel
 *
 * First parse: from the bytes alone, into a struct request. Then serve. Nothing that is served
 * looks at the message again but for a WRITE's content and what is forwarded, so a READ's content
 * may overwrite it.
 *
 * Two errors must never be a page request's answer (Linux 6.18): one ENOSYS to a FALLOCATE of any
 * file turns fallocate off for the mount, one EOPNOTSUPP to the loop device's punch turns its
 * discard off.
 */
#define _GNU_SOURCE
#include "switch.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/*
 * Long is what takes longer than waking another lane: some 10 us of work. A page takes about 1 us
 * to read, 5 us to write, 0.1 us to discard.
 */
#define SHORT_READ_BYTES (8 * PAGE_BYTES)
#define SHORT_WRITE_BYTES (2 * PAGE_BYTES)
#define SHORT_PUNCH_BYTES (64 * PAGE_BYTES)

/* What is punched between two steps of a lane: a page of the slot table, some 50 us. */
#define PUNCH_BYTES (TABLE_SLOTS * PAGE_BYTES)

#define FALLOC_FREE (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)

bool switch_reply(const struct fuse_switch *sw, const struct fuse_out_header *out)
{
	struct fuse_out_header failed = {
		.len = sizeof(failed), .error = -EIO, .unique = out->unique};
	ssize_t rv;

	do
		rv = write(sw->options.fuse_fd, out, out->len);
	while (rv < 0 && errno == EINTR);
	if (rv == (ssize_t)out->len)
		return true;
	/* ENOENT: the request was interrupted or aborted. A unique of 0 is pyfuse3's notification. */
	if (out->unique && (rv >= 0 || errno != ENOENT))
		rv = write(sw->options.fuse_fd, &failed, sizeof(failed));
	return false;
}

void switch_answer(const struct fuse_switch *sw, uint64_t unique, int error)
{
	struct fuse_out_header out = {.len = sizeof(out), .error = error, .unique = unique};

	/* The kernel takes a unique of 0 for a notification. */
	if (unique)
		switch_reply(sw, &out);
}

bool request_wants_answer(uint32_t opcode)
{
	return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT &&
	       opcode != FUSE_NOTIFY_REPLY;
}

/* Offsets are loff_t: nothing lies past INT64_MAX. */
static bool in_file_range(uint64_t offset, uint64_t length)
{
	return offset <= INT64_MAX && length <= INT64_MAX - offset;
}

static void parse_read(const struct fuse_switch *sw, const void *args, size_t bytes,
		       struct request *r)
{
	const struct fuse_read_in *in = args;

	if (bytes != sizeof(*in) || in->size > sw->options.max_request_bytes ||
	    !in_file_range(in->offset, in->size))
		return;
	r->kind = REQUEST_READ;
	r->offset = in->offset;
	r->length = in->size;
}

static void parse_write(const struct fuse_switch *sw, const void *args, size_t bytes,
			struct request *r)
{
	const struct fuse_write_in *in = args;

	if (bytes < sizeof(*in) || in->size != bytes - sizeof(*in) ||
	    in->size > sw->options.max_request_bytes || !in_file_range(in->offset, in->size))
		return;
	r->kind = REQUEST_WRITE;
	r->offset = in->offset;
	r->length = in->size;
}

/* Of the swap file. Modes that free nothing are refused: space is not reserved here. */
static void parse_fallocate(const struct fuse_switch *sw, const void *args, size_t bytes,
			    struct request *r)
{
	const struct fuse_fallocate_in *in = args;
	bool inside;

	if (bytes != sizeof(*in) || !in->length || !in_file_range(in->offset, in->length))
		return;
	inside = in->offset + in->length <= sw->file_bytes;
	r->offset = in->offset;
	r->length = in->length;
	switch (in->mode) {
	case FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE:
	case FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE:
		r->kind = REQUEST_PUNCH;
		return;
	case FALLOC_FL_ZERO_RANGE:
		r->kind = inside ? REQUEST_PUNCH : REQUEST_ANSWER;
		r->error = -EFBIG;
		return;
	default:
		r->kind = in->mode & FALLOC_FREE ? REQUEST_MALFORMED : REQUEST_ANSWER;
		r->error = -EOPNOTSUPP;
	}
}

static void parse_swap(const struct fuse_switch *sw, const void *args, size_t bytes,
		       struct request *r)
{
	switch (r->opcode) {
	case FUSE_READ:
		parse_read(sw, args, bytes, r);
		return;
	case FUSE_WRITE:
		parse_write(sw, args, bytes, r);
		return;
	case FUSE_FALLOCATE:
		parse_fallocate(sw, args, bytes, r);
		return;
	case FUSE_FSYNC:
		if (bytes == sizeof(struct fuse_fsync_in))
			r->kind = REQUEST_ANSWER;
		return;
	case FUSE_FLUSH:
		/* So that close() does not wait for Python. */
		if (bytes == sizeof(struct fuse_flush_in))
			r->kind = REQUEST_ANSWER;
		return;
	default:
		r->kind = REQUEST_FORWARD;
	}
}

void request_parse(const struct fuse_switch *sw, const uint8_t *message, size_t bytes,
		   struct request *r)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)message;
	size_t extensions;

	*r = (struct request){.kind = REQUEST_MALFORMED};
	if (bytes < sizeof(*in))
		return;
	r->opcode = in->opcode;
	if (request_wants_answer(in->opcode))
		r->unique = in->unique;
	extensions = 8UL * in->total_extlen;
	bytes -= sizeof(*in);
	if (in->len != bytes + sizeof(*in) || extensions > bytes)
		return;
	bytes -= extensions;
	if (in->opcode == FUSE_INTERRUPT) {
		/* Page requests never wait; libfuse would keep it, for one that it never saw. */
		r->kind = REQUEST_DROP;
	} else if (in->opcode == FUSE_INIT) {
		/* One comes, and of 7.6 or later. */
		if (!sw->init_known && bytes >= offsetof(struct fuse_init_in, flags2))
			r->kind = REQUEST_FORWARD;
	} else if (in->nodeid == sw->options.swap_inode) {
		parse_swap(sw, in + 1, bytes, r);
	} else if (in->opcode == FUSE_FALLOCATE) {
		r->kind = REQUEST_ANSWER;
		r->error = -EOPNOTSUPP;
	} else {
		r->kind = REQUEST_FORWARD;
	}
}

/* Who stores a page may have to wait for a chunk. A punch stores where it parts a page. */
bool request_is_long(const struct fuse_switch *sw, const struct request *r)
{
	switch (r->kind) {
	case REQUEST_READ:
		return r->length > SHORT_READ_BYTES;
	case REQUEST_WRITE:
		return r->length > SHORT_WRITE_BYTES || !store_has_ready(sw->store);
	case REQUEST_PUNCH:
		return r->length > SHORT_PUNCH_BYTES || !store_has_ready(sw->store);
	default:
		return false;
	}
}

static void serve_read(struct fuse_switch *sw, struct buffer *buffer)
{
	const struct request *r = &buffer->request;
	uint8_t *payload = buffer->message + PAYLOAD_AT;
	struct fuse_out_header *out = (struct fuse_out_header *)payload - 1;
	int64_t rv = store_pread(sw->store, r->offset, r->length, payload);

	if (buffer->used < PAYLOAD_AT + r->length)
		buffer->used = PAYLOAD_AT + r->length;
	if (rv < 0) {
		switch_answer(sw, r->unique, (int)rv);
		return;
	}
	*out = (struct fuse_out_header){.len = (uint32_t)(sizeof(*out) + (size_t)rv),
					.unique = r->unique};
	if (r->unique)
		switch_reply(sw, out);
}

/*
 * A write that was stored in part is ENOSPC, not a short count: the loop device takes a short
 * count for success (drivers/block/loop.c, lo_complete_rq(): only reads are compared with their
 * length), and the rest is lost. Seen on Linux 6.18 without direct I/O, and with it where
 * FUSE_ASYNC_DIO is off.
 */
static void serve_write(struct fuse_switch *sw, const struct buffer *buffer)
{
	const struct request *r = &buffer->request;
	struct {
		struct fuse_out_header header;
		struct fuse_write_out write;
	} out = {.header = {.len = sizeof(out), .unique = r->unique}};
	int64_t rv = store_pwrite(sw->store, r->offset, r->length, buffer->message + PAYLOAD_AT);

	if (rv >= 0 && (uint64_t)rv < r->length)
		rv = -ENOSPC;
	if (rv < 0) {
		switch_answer(sw, r->unique, (int)rv);
		return;
	}
	out.write.size = (uint32_t)rv;
	if (r->unique)
		switch_reply(sw, &out.header);
}

/*
 * One request may free the whole file, and take longer than the supervisor waits for a lane's next
 * step. So each piece is a step. Pieces end where pages do.
 */
static void serve_punch(struct lane *lane, const struct request *r)
{
	struct fuse_switch *sw = lane->sw;
	uint64_t end = r->offset + r->length;
	int rv = 0;

	if (end > sw->file_bytes)
		end = sw->file_bytes;
	for (uint64_t at = r->offset, next; at < end && !rv; at = next) {
		next = (at / PUNCH_BYTES + 1) * PUNCH_BYTES;
		if (next > end)
			next = end;
		rv = store_punch(sw->store, at, next - at);
		journal_begin(lane->journal);
	}
	switch_answer(sw, r->unique, rv);
}

static void serve_forward(struct fuse_switch *sw, const struct buffer *buffer)
{
	const struct fuse_in_header *in = (const struct fuse_in_header *)buffer->message;
	int rv;

	if (buffer->request.opcode == FUSE_INIT)
		init_remember(sw, buffer->message, in->len);
	rv = relay_forward(sw, buffer->message, in->len);
	if (rv)
		switch_answer(sw, buffer->request.unique, rv);
}

void request_serve(struct lane *lane, struct buffer *buffer)
{
	const struct request *r = &buffer->request;
	struct fuse_switch *sw = lane->sw;

	switch (r->kind) {
	case REQUEST_DROP:
		return;
	case REQUEST_ANSWER:
		switch_answer(sw, r->unique, r->error);
		return;
	case REQUEST_MALFORMED:
		store_note_invalid(sw->store);
		switch_answer(sw, r->unique, -EINVAL);
		return;
	case REQUEST_FORWARD:
		serve_forward(sw, buffer);
		return;
	case REQUEST_READ:
		serve_read(sw, buffer);
		return;
	case REQUEST_WRITE:
		serve_write(sw, buffer);
		return;
	case REQUEST_PUNCH:
		serve_punch(lane, r);
		return;
	}
}
