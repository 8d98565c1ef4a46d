/* SPDX-License-Identifier: MIT
 *
 * Fuzzes the switch with what a kernel and a pyfuse3 might send. An input is a list of records:
 *
 *   length (2 bytes, little endian), kind (1 byte), then length bytes
 *
 * kind 0: a message of the kernel as it is; 1: made a page request, more or less well-formed, so
 * that the fuzzer does not have to guess; 2: with its length set right; 3: the same, 70 times,
 * which fills the ring; 4: a reply of pyfuse3; 5: pyfuse3 reads what has come; 6: an INIT reply for
 * init_rewrite() alone. There are no threads: each record is served at once. Page contents are
 * compared with a copy.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "switch.h"

#define NR_PAGES 64
#define FILE_BYTES (NR_PAGES * PAGE_BYTES)
#define REQUEST_BYTES (4 * PAGE_BYTES)
#define SWAP 2

static struct store *store;
static struct switch_options options;
static int kernel, python;	 /* our ends */
static uint8_t file[FILE_BYTES]; /* what the swap file should hold */

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t nr);

static void check(bool good)
{
	if (!good)
		abort();
}

static void open_pair(int *ours, int *theirs)
{
	int fds[2];

	check(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, fds));
	*ours = fds[0];
	*theirs = fds[1];
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	struct store_options store_options = {.nr_pages = NR_PAGES,
					      .reserve_bytes = 1 << 20,
					      .chunk_bytes = STORE_MAX_CHUNK_BYTES};
	uint32_t flags;

	(void)argc;
	(void)argv;
	check(!store_create(&store, region_memory(&flags), &store_options));
	options = (struct switch_options){.nr_lanes = 1,
					  .latency_fd = -1,
					  .max_request_bytes = REQUEST_BYTES,
					  .swap_inode = SWAP,
					  .end_fd = eventfd(0, EFD_NONBLOCK)};
	open_pair(&kernel, &options.fuse_fd);
	open_pair(&python, &options.socket_fd);
	return 0;
}

static void drain(int fd)
{
	static uint8_t bytes[1 << 16];

	while (recv(fd, bytes, sizeof(bytes), 0) >= 0)
		;
}

/* Return: did the kernel get an answer to @unique? It is left in @answer. */
static bool answered(uint64_t unique, uint8_t *answer, size_t nr)
{
	struct fuse_out_header *out = (struct fuse_out_header *)answer;
	ssize_t n = recv(kernel, answer, nr, 0);

	if (n < 0)
		return false;
	check((size_t)n >= sizeof(*out) && out->len == (size_t)n && out->unique == unique &&
	      unique);
	check(out->error <= 0 && (!out->error || (size_t)n == sizeof(*out)));
	return true;
}

/* What the file must be after a request that succeeded, and what a READ must have returned. */
static void follow(const struct request *r, const uint8_t *payload, const uint8_t *answer)
{
	const struct fuse_out_header *out = (const struct fuse_out_header *)answer;
	const struct fuse_write_out *written = (const struct fuse_write_out *)(out + 1);
	uint64_t length = r->offset >= FILE_BYTES	       ? 0
			  : r->length > FILE_BYTES - r->offset ? FILE_BYTES - r->offset
							       : r->length;

	if (out->error)
		return;
	if (r->kind == REQUEST_READ) {
		check(out->len == sizeof(*out) + length);
		check(!memcmp(out + 1, file + (length ? r->offset : 0), length));
	} else if (r->kind == REQUEST_WRITE) {
		check(out->len == sizeof(*out) + sizeof(*written) && written->size == r->length);
		check(length == r->length);
		memcpy(file + (length ? r->offset : 0), payload, length);
	} else if (r->kind == REQUEST_PUNCH) {
		memset(file + (length ? r->offset : 0), 0, length);
	}
}

static void serve(struct fuse_switch *sw, size_t nr)
{
	static uint8_t answer[PAGE_BYTES + REQUEST_BYTES], payload[REQUEST_BYTES];
	struct buffer *buffer = &sw->buffers[0];
	struct request *r = &buffer->request;
	bool got;

	request_parse(sw, buffer->message, nr, r);
	if (r->kind == REQUEST_WRITE)
		memcpy(payload, buffer->message + PAYLOAD_AT, r->length);
	request_is_long(sw, r);
	request_serve(&sw->lanes[0], buffer);
	got = answered(r->unique, answer, sizeof(answer));
	/* Who waits gets one answer, here or by pyfuse3. */
	if (r->kind == REQUEST_FORWARD || r->kind == REQUEST_DROP)
		check(!got || r->unique);
	else
		check(got == (r->unique != 0));
	if (got)
		follow(r, payload, answer);
}

/* Bits of @how choose what is set right. Return: the message's length. */
static size_t make_plausible(uint8_t *message, size_t nr, uint8_t how)
{
	static const uint32_t opcodes[] = {FUSE_READ, FUSE_WRITE, FUSE_FALLOCATE, FUSE_FSYNC};
	struct fuse_in_header *in = (struct fuse_in_header *)message;
	struct fuse_write_in *write = (struct fuse_write_in *)(in + 1); /* and fuse_read_in */
	struct fuse_fallocate_in *fallocate = (struct fuse_fallocate_in *)(in + 1);

	in->nodeid = SWAP;
	in->opcode = opcodes[how & 3];
	in->total_extlen = 0;
	if (how & 4)
		write->offset %= FILE_BYTES + PAGE_BYTES; /* fallocate->offset is there, too */
	if (in->opcode == FUSE_FALLOCATE && how & 8) {
		fallocate->length %= FILE_BYTES;
		fallocate->mode = how & 16 ? FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
					   : FALLOC_FL_ZERO_RANGE;
		nr = sizeof(*in) + sizeof(*fallocate);
	} else if (in->opcode == FUSE_READ && how & 8) {
		write->size %= REQUEST_BYTES + 2;
		nr = sizeof(*in) + sizeof(struct fuse_read_in);
	} else if (in->opcode == FUSE_WRITE && how & 8) {
		/* Content of any length, partly compressible. */
		write->size %= REQUEST_BYTES + 1;
		for (size_t i = nr < PAYLOAD_AT ? PAYLOAD_AT : nr; i < PAYLOAD_AT + write->size;
		     i++)
			message[i] = (uint8_t)(how & 16 ? i * i >> 3 : how);
		nr = PAYLOAD_AT + write->size;
	}
	in->len = (uint32_t)nr;
	return nr;
}

static void request(struct fuse_switch *sw, const uint8_t *bytes, size_t nr, uint8_t kind)
{
	uint8_t *message = sw->buffers[0].message;
	struct fuse_in_header *in = (struct fuse_in_header *)message;

	memset(message, 0, sw->message_bytes);
	memcpy(message, bytes, nr);
	if (kind == 1)
		nr = make_plausible(message, nr, bytes[0]);
	else if (kind > 1)
		in->len = (uint32_t)nr;
	/* Else nobody would be told what was changed. */
	if (!in->unique)
		in->unique = 1;
	serve(sw, nr);
}

static void rewrite(const uint8_t *bytes, size_t nr)
{
	/* No more room than promised, so that ASan sees a step too far. */
	uint8_t *reply = malloc(INIT_REPLY_BYTES);
	uint32_t offered;

	check(reply != NULL);
	if (nr > INIT_REPLY_BYTES)
		nr = INIT_REPLY_BYTES;
	if (nr >= sizeof(struct fuse_out_header)) {
		memset(reply, 0, INIT_REPLY_BYTES);
		memcpy(reply, bytes, nr);
		memcpy(&offered, bytes + 8, sizeof(offered));
		check(init_rewrite(reply, nr, offered, REQUEST_BYTES) <= INIT_REPLY_BYTES);
	}
	free(reply);
}

static void record(struct fuse_switch *sw, uint8_t kind, const uint8_t *bytes, size_t nr)
{
	kind %= 7;
	if (kind <= 3) {
		for (int i = 0; i < (kind == 3 ? 70 : 1); i++)
			if (nr && nr <= sw->message_bytes)
				request(sw, bytes, nr, kind);
	} else if (kind == 4) {
		if (nr && send(python, bytes, nr, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
			relay_receive(sw);
	} else if (kind == 5) {
		relay_send(sw);
		drain(python);
	} else {
		rewrite(bytes, nr);
	}
	drain(kernel);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t nr)
{
	struct fuse_switch *sw;

	check(!switch_create(&sw, store, &options));
	memset(file, 0, sizeof(file));
	store_punch(store, 0, FILE_BYTES);
	while (nr >= 3) {
		size_t length = (size_t)(bytes[0] | bytes[1] << 8) % (nr - 2);

		record(sw, bytes[2], bytes + 3, length);
		bytes += 3 + length;
		nr -= 3 + length;
	}
	relay_send(sw);
	drain(python);
	drain(kernel);
	switch_destroy(sw);
	return 0;
}
