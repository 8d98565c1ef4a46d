/* SPDX-License-Identifier: MIT
 *
 * switch - native code is the only reader of /dev/fuse; pyfuse3 sits behind it
 *
 *   /dev/fuse --> lanes --> READ, WRITE, FALLOCATE, FSYNC of the swap file: store, reply
 *                   |
 *                   +-----> all else: send() --> pyfuse3
 *   /dev/fuse <-- relay <----------------------- pyfuse3's replies
 *
 * Exactly one lane reads at a time: the holder of the token. It serves a short request while it
 * keeps the token, so that nobody is woken for it; before a long one it gives the token away, and
 * a parked lane reads on. Parked lanes sleep on the token, not in poll(): no request wakes more
 * than one thread.
 *
 * A lane never waits for Python. What the socket does not take goes to the backlog, which the
 * relay drains; what the backlog does not take is answered EAGAIN.
 *
 * Locks: the token, or none, then backlog.lock. No lock is held while the store is called but the
 * token, which nobody inside the store wants.
 */
#ifndef SWITCH_H
#define SWITCH_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "store.h"

#define BACKLOG_BYTES (1U << 20)

/* Messages for pyfuse3 that its socket had no room for; a ring of (length, bytes). */
struct backlog {
	pthread_mutex_t lock;
	char *ring; /* BACKLOG_BYTES */
	size_t head, used;
	_Atomic bool filled;
};

struct lane {
	struct fuse_switch *sw;
	pthread_t thread;
	char *memory;
	char *in;  /* a request; the content of a WRITE lies on a page boundary */
	char *out; /* a reply; the content of a READ lies on a page boundary */
};

struct fuse_switch {
	struct store *store;
	struct switch_options options;
	pthread_mutex_t token;
	uint64_t last_us; /* when the last request came; under the token */
	_Atomic bool stopping;
	_Atomic int error;	      /* of what ended it, 0: unmounted */
	_Atomic bool ready;	      /* INIT is answered */
	_Atomic uint64_t init_unique; /* of the INIT that pyfuse3 has, 0: none */
	_Atomic uint32_t init_flags;  /* what the kernel offered */
	int wake_fd;		      /* eventfd: the relay has something to look at */
	struct backlog backlog;
	char *relay_buffer;
	pthread_t relay;
	struct lane lanes[];
};

/* Bytes that a lane's read() must take: headers of a WRITE and its content. */
static inline size_t switch_request_bytes(const struct fuse_switch *sw)
{
	return sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in) +
	       sw->options.max_request_bytes;
}

/** switch_is_long - may serving @message of @length bytes take so long that others should read? */
bool switch_is_long(const char *message, size_t length);

/**
 * switch_serve - answer or forward one request
 * @lane:   whose reply buffer may be used
 * @length: bytes at lane->in; may be less or more than the request says
 */
void switch_serve(struct lane *lane, size_t length);

/**
 * switch_change_init - raise the limits in pyfuse3's reply to INIT
 * @reply:  at least sizeof(struct fuse_out_header) + sizeof(struct fuse_init_out) bytes
 * @length: of the reply
 *
 * Return: its new length.
 */
size_t switch_change_init(const struct fuse_switch *sw, char *reply, size_t length);

/** backlog_send - send what waits, until the socket is full again. Return: anything left? */
bool backlog_send(struct fuse_switch *sw);

#endif
