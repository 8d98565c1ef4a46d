/* SPDX-License-Identifier: MIT
 *
 * switch - /dev/fuse on one side, pyfuse3's socket on the other; the insides, for switch*.c, tests
 * and fuzzers
 *
 *                                 page requests
 *               .-> lanes ------------------------------> store
 *   /dev/fuse --+    |  answer at once
 *       ^       |    | anything else
 *       |       |   ring
 *       |       |    v
 *       '------ relay <--- socket, SOCK_SEQPACKET ---> pyfuse3
 *
 * A page request is READ, WRITE, FALLOCATE or FSYNC of the swap file. switch_request.c says what
 * happens to each opcode, README.md has the table.
 *
 * The token: whoever holds it is the only reader of /dev/fuse and the only producer of the ring.
 * It serves a short request while holding it, so that nobody is woken for that one. Before a long
 * one it gives the token away, which wakes one parked lane. Parked lanes sleep on the token and
 * never in poll(), so an arriving request wakes one thread at the most.
 *
 * The backlog: reads overtake writes. A task waits for a read; for a write, seldom. While as many
 * lanes write as there are CPUs, less one, the token's holder puts further long writes there and
 * goes on reading. Those that write empty it. The holder joins them when it is full.
 *
 * What always holds:
 * - A page request waits for the store and for nothing else: not for Python, not for the relay.
 * - The lanes ask the OS for no memory. Even the kernel memory of a message in the socket is asked
 *   for by the relay, so that a lane cannot end up in reclaim, which may wait for lanes.
 * - A request that is not page I/O reaches pyfuse3 whole, once, in the kernel's order, or is
 *   answered here; every request that wants an answer gets one.
 * - Replies go through the relay in pyfuse3's order; only INIT's is changed.
 * - While there is a backlog, a lane is writing.
 *
 * Locks: the token, then the backlog's (a few instructions). The store's nest inside the token
 * (short requests).
 */
#ifndef SWITCH_H
#define SWITCH_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "prelude.h"
#include "store.h"

#define SWITCH_MAX_REQUEST_BYTES (1U << 20)

/* Where the content of a WRITE begins in its message. A READ's answer uses the same memory. */
#define PAYLOAD_AT (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#define INIT_REPLY_BYTES (sizeof(struct fuse_out_header) + sizeof(struct fuse_init_out))

/* Messages on their way from the lanes to pyfuse3, each at a multiple of 8 bytes and as long as
 * its header says. One producer (the token's holder), one consumer (the relay). */
struct ring {
	uint8_t *bytes;
	uint64_t size; /* a power of two */
	/* Bytes ever put in and ever taken out; each written by its own side only. */
	_Atomic uint64_t head __attribute__((aligned(64)));
	_Atomic uint64_t tail __attribute__((aligned(64)));
};

struct lane {
	struct fuse_switch *sw;
	struct journal_lane *journal;
	pthread_t thread;
} __attribute__((aligned(64)));

/* Long writes that wait while the lanes read on. */
#define BACKLOG_LENGTH 8

struct backlog {
	pthread_mutex_t lock;
	struct buffer *free; /* a stack: the last one used is in the caches */
	uint32_t nr_free;
	struct buffer *first, *last;
	uint32_t length;
	uint32_t nr_writing;  /* lanes that serve long writes */
	uint32_t max_writing; /* from there on writes wait, as long as there is room */
};

struct fuse_switch {
	struct store *store;
	struct switch_options options;
	uint64_t file_bytes;
	uint64_t message_bytes; /* room behind lane->message, and for the relay's replies */
	int wake_fd;		/* eventfd: the ring has something, or the relay shall stop */

	pthread_mutex_t token;
	/* Under the token. */
	bool ended;
	uint32_t nr_close; /* requests since the last sleep */
	bool unwiped;	   /* may buffers hold content? */
	bool spins;	   /* was the last request a read? */
	bool awake;	   /* are the CPUs kept from sleeping? */
	int error;	   /* what ended it: 0 (unmounted) or -errno */

	struct journal *journal;
	/* Written once, under the token or before there are threads, and before init_unique is. */
	bool init_known;
	bool init_replayed;	      /* its answer is not for the kernel, which has one */
	uint32_t init_offered;	      /* fuse_init_in.flags */
	_Atomic uint64_t init_unique; /* INIT that pyfuse3 has to answer; 0: none */
	_Atomic bool ready;

	struct ring ring;
	uint8_t *reply; /* the relay's */
	pthread_t relay;
	_Atomic bool relay_stop;
	_Atomic bool python_gone;

	struct backlog backlog;
	struct buffer *buffers; /* nr_lanes + BACKLOG_LENGTH */

	uint8_t *memory; /* reply, ring and the buffers' messages */
	size_t memory_bytes;
	struct lane lanes[];
};

enum request_kind {
	REQUEST_DROP,	   /* nobody waits for an answer */
	REQUEST_ANSWER,	   /* with error alone */
	REQUEST_MALFORMED, /* counted, and EINVAL where there is whom to answer */
	REQUEST_FORWARD,
	REQUEST_READ,
	REQUEST_WRITE,
	REQUEST_PUNCH,
};

/* What a lane knows of a message after one look; the message itself is not needed to answer. */
struct request {
	enum request_kind kind;
	int error; /* REQUEST_ANSWER: 0 or -errno */
	uint32_t opcode;
	uint64_t unique; /* 0: nobody to answer */
	uint64_t offset;
	uint64_t length;
};

/* Where one message is from its reading to its answer. */
struct buffer {
	/* message + PAYLOAD_AT is at an OS page's start, so that the kernel copies page to page. */
	uint8_t *message;
	size_t used; /* bytes that may hold content; wiped when a lane goes to sleep */
	struct request request;
	struct buffer *next;
};

/**
 * switch_create - everything but the threads
 *
 * Return: 0, -EINVAL (options), -ENOMEM, or why there is no eventfd.
 */
int switch_create(struct fuse_switch **out, struct store *store,
		  const struct switch_options *options);

/** switch_destroy - the opposite; threads must have ended. */
void switch_destroy(struct fuse_switch *sw);

/**
 * switch_reply - write one message to the kernel
 * @out: header, and behind it what out->len says
 *
 * When it cannot be delivered, the request gets EIO; when the kernel has given the request up,
 * nothing is done.
 *
 * Return: was it delivered?
 */
bool switch_reply(const struct fuse_switch *sw, const struct fuse_out_header *out);

/** switch_answer - reply without content. @unique 0: there is nobody to answer. */
void switch_answer(const struct fuse_switch *sw, uint64_t unique, int error);

/**
 * request_parse - decide what happens to a message
 * @bytes: length of @message as it was read, <= sw->message_bytes; its header may say otherwise
 */
void request_parse(const struct fuse_switch *sw, const uint8_t *message, size_t bytes,
		   struct request *out);

/** request_is_long - may it take long enough that another lane should read meanwhile? */
bool request_is_long(const struct fuse_switch *sw, const struct request *request);

/**
 * request_serve - answer or forward the request in a buffer
 * @lane: the caller; has begun a request in the journal
 *
 * Context: holds the token unless request_is_long().
 */
void request_serve(struct lane *lane, struct buffer *buffer);

/** buffer_take - Return: a buffer; there is always one for a lane that holds none. */
struct buffer *buffer_take(struct fuse_switch *sw);

/** buffer_give - the opposite */
void buffer_give(struct fuse_switch *sw, struct buffer *buffer);

/**
 * buffers_wipe - leave nothing of a page in the free buffers and in @own
 *
 * Return: were those all?
 */
bool buffers_wipe(struct fuse_switch *sw, struct buffer *own);

/**
 * backlog_put - let a long write wait for a lane that is writing already
 *
 * Return: true; false when the caller shall give the token away and call backlog_serve().
 */
bool backlog_put(struct fuse_switch *sw, struct buffer *buffer);

/**
 * backlog_serve - serve a long write, and then those that wait
 * @lane:   the caller; has begun a request in the journal
 * @buffer: taken over
 *
 * Returns when none waits, or after one where enough other lanes are writing.
 */
void backlog_serve(struct lane *lane, struct buffer *buffer);

/** request_wants_answer - does a task wait for it? */
bool request_wants_answer(uint32_t opcode);

/**
 * init_remember - note what the reply's rewriting, and a later worker, need of INIT
 *
 * Context: holds the token. Once for a switch.
 */
void init_remember(struct fuse_switch *sw, const uint8_t *message, size_t bytes);

/**
 * init_replay - give pyfuse3 the INIT that an earlier worker has remembered
 *
 * Where it is damaged pyfuse3 counts as gone.
 *
 * Context: before the threads.
 * Return: has there been an earlier worker?
 */
bool init_replay(struct fuse_switch *sw);

/**
 * init_rewrite - change pyfuse3's reply to INIT
 * @reply:   header and fuse_init_out as far as they go; room for INIT_REPLY_BYTES
 * @bytes:   its length
 * @offered: flags of the kernel's INIT
 *
 * Return: its new length; unchanged where the reply is an error or no fuse_init_out.
 */
size_t init_rewrite(uint8_t *reply, size_t bytes, uint32_t offered, uint32_t max_request_bytes);

/**
 * relay_forward - hand a message to the relay
 * @message: one whole message; not retained
 *
 * Context: holds the token. Does not wait.
 * Return: 0, -EAGAIN (ring full), -EIO (pyfuse3 is gone).
 */
int relay_forward(struct fuse_switch *sw, const uint8_t *message, size_t bytes);

/** relay_send - pass the ring's content on. Return: false when the socket is full. */
bool relay_send(struct fuse_switch *sw);

/** relay_receive - pass on what pyfuse3 has replied so far. */
void relay_receive(struct fuse_switch *sw);

/** relay_run - the relay's thread; ends on relay_stop. @arg: the switch */
void *relay_run(void *arg);

#endif
