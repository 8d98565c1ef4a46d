/* SPDX-License-Identifier: MIT
 *
 * switch - lanes and their token, from start to unmount; see switch.h
 *
 * Memory, one mapping, populated ahead, not in core dumps, not copied to children (a child's copy
 * would make the next touch of a lane a fault that needs memory):
 *
 *   | ring | reply | buffer 0: 4016 free, headers (80) | payload | buffer 1: ... |
 */
#define _GNU_SOURCE
#include "switch.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "memory.h"

#define STACK_BYTES (256U << 10)
#define MIN_RING_BYTES (1U << 20)
#define SPIN_PAUSES 16 /* some 0.4 us between reads that find nothing in 0.2 us */

/*
 * From how many requests in close succession on CPUs shall not sleep. Beside the 36 us that waking
 * a halted CPU costs, writing to /dev/cpu_dma_latency is cheap, but not for one page.
 */
#define AWAKE_AFTER 8
#define AWAKE_MS 1 /* without a request, until they may sleep again */
#define ANY_LATENCY_US 2000000000

/* linux/fuse.h has it from Linux 6.9 on. */
#define NOTIFY_RESEND 7

/* Quiet after which no page shall stay in the buffers. */
#define WIPE_AFTER_MS 10

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void cpu_relax(void)
{
	for (int i = 0; i < SPIN_PAUSES; i++)
#if defined(__x86_64__) || defined(__i386__)
		__builtin_ia32_pause();
#elif defined(__aarch64__)
		__asm__ volatile("isb");
#else
		__asm__ volatile("");
#endif
}

/* Ask the kernel's PM QoS to keep CPUs from sleep states, or no longer. A request fails only where
 * the descriptor is of something else. */
static void keep_awake(struct fuse_switch *sw, bool awake)
{
	int32_t latency_us = awake ? 0 : ANY_LATENCY_US;
	ssize_t rv;

	if (sw->options.latency_fd < 0 || sw->awake == awake)
		return;
	rv = write(sw->options.latency_fd, &latency_us, sizeof(latency_us));
	(void)rv;
	sw->awake = awake;
}

/*
 * Nothing to read: look again soon, or sleep. Only after a read it pays to look: its task may fault
 * again at once; after a write the CPU is better left to whoever reclaims. The clock starts at the
 * first miss after a request, so that requests that follow each other closely do not ask for the
 * time at all.
 */
static void wait_for_request(struct fuse_switch *sw, struct buffer *own, uint64_t *sleep_at)
{
	struct pollfd fd = {.fd = sw->options.fuse_fd, .events = POLLIN};
	uint64_t now = now_us();

	if (!*sleep_at)
		*sleep_at = now + (sw->spins ? sw->options.spin_us : 0);
	if (sw->nr_close >= AWAKE_AFTER)
		keep_awake(sw, true);
	if (now < *sleep_at) {
		cpu_relax();
		return;
	}
	if (sw->awake && poll(&fd, 1, AWAKE_MS) > 0)
		return;
	keep_awake(sw, false);
	sw->nr_close = 0;
	if (!sw->unwiped)
		poll(&fd, 1, -1);
	/* What poll() has seen may be gone when it is read: its task was killed. */
	else if (poll(&fd, 1, WIPE_AFTER_MS) <= 0)
		sw->unwiped = !buffers_wipe(sw, own);
}

/* Context: holds the token. Return: length of the message, -errno of the end. */
static ssize_t next_message(struct fuse_switch *sw, struct buffer *buffer)
{
	uint64_t sleep_at = 0;

	for (;;) {
		ssize_t n = read(sw->options.fuse_fd, buffer->message, sw->message_bytes);

		if (n > 0)
			return n;
		/* /dev/fuse never ends like this; a socket in its place does. */
		if (n == 0)
			return -ENODEV;
		if (errno == EAGAIN)
			wait_for_request(sw, buffer, &sleep_at);
		else if (errno != EINTR && errno != ENOENT) /* ENOENT: given up while read */
			return -errno;
	}
}

/* Serve what is in a buffer without the token, so that another lane reads meanwhile. */
static void serve_long(struct lane *lane, struct buffer *buffer)
{
	struct fuse_switch *sw = lane->sw;

	pthread_mutex_unlock(&sw->token);
	if (buffer->request.kind == REQUEST_WRITE) {
		backlog_serve(lane, buffer);
	} else {
		request_serve(lane, buffer);
		buffer_give(sw, buffer);
	}
	journal_end(lane->journal); /* parked on the token, for ever maybe, it has nothing to do */
	pthread_mutex_lock(&sw->token);
}

/* Context: holds the token. Return: false at the end. */
static bool lane_step(struct lane *lane)
{
	struct fuse_switch *sw = lane->sw;
	struct buffer *buffer = buffer_take(sw);
	struct request *request = &buffer->request;
	ssize_t n = next_message(sw, buffer);

	if (n < 0) {
		buffer_give(sw, buffer);
		sw->ended = true;
		sw->error = n == -ENODEV ? 0 : (int)n;
		keep_awake(sw, false);
		eventfd_write(sw->options.end_fd, 1);
		return false;
	}
	journal_begin(lane->journal);
	sw->nr_close++;
	sw->unwiped = true;
	if (buffer->used < (size_t)n)
		buffer->used = (size_t)n;
	request_parse(sw, buffer->message, (size_t)n, request);
	sw->spins = request->kind == REQUEST_READ;
	if (!request_is_long(sw, request)) {
		request_serve(lane, buffer);
		buffer_give(sw, buffer);
	} else if (request->kind != REQUEST_WRITE || !backlog_put(sw, buffer)) {
		serve_long(lane, buffer);
	}
	journal_end(lane->journal);
	return !sw->ended;
}

static void *lane_run(void *arg)
{
	struct lane *lane = arg;
	struct fuse_switch *sw = lane->sw;

	memory_touch_stack();
	pthread_mutex_lock(&sw->token);
	while (!sw->ended && lane_step(lane))
		;
	pthread_mutex_unlock(&sw->token);
	return NULL;
}

static bool options_are_valid(const struct switch_options *o)
{
	return o->nr_lanes >= 1 && o->nr_lanes <= SWITCH_MAX_LANES &&
	       o->max_request_bytes >= PAGE_BYTES &&
	       o->max_request_bytes <= SWITCH_MAX_REQUEST_BYTES &&
	       o->max_request_bytes % PAGE_BYTES == 0;
}

/* Room for any message that is queued alone; a power of two. */
static uint64_t ring_bytes(uint64_t message_bytes)
{
	uint64_t bytes = MIN_RING_BYTES;

	while (bytes < 2 * message_bytes)
		bytes *= 2;
	return bytes;
}

static int map_memory(struct fuse_switch *sw)
{
	uint32_t nr_buffers = sw->options.nr_lanes + BACKLOG_LENGTH;
	uint64_t payload_bytes = sw->options.max_request_bytes;
	uint64_t buffer_bytes;

	if (payload_bytes < FUSE_MIN_READ_BUFFER)
		payload_bytes = FUSE_MIN_READ_BUFFER;
	buffer_bytes = PAGE_BYTES + payload_bytes;
	sw->message_bytes = PAYLOAD_AT + payload_bytes;
	sw->ring.size = ring_bytes(sw->message_bytes);
	sw->memory_bytes = sw->ring.size + buffer_bytes * (nr_buffers + 1);
	sw->buffers = calloc(nr_buffers, sizeof(*sw->buffers));
	if (!sw->buffers)
		return -ENOMEM;
	sw->memory = memory_map(sw->memory_bytes);
	if (!sw->memory)
		return -ENOMEM;
	madvise(sw->memory, sw->memory_bytes, MADV_DONTFORK);
	sw->ring.bytes = sw->memory;
	sw->reply = sw->memory + sw->ring.size;
	for (uint32_t i = 0; i < nr_buffers; i++) {
		uint8_t *end = sw->reply + (i + 2) * buffer_bytes;

		sw->buffers[i].message = end - payload_bytes - PAYLOAD_AT;
		buffer_give(sw, &sw->buffers[i]);
	}
	return 0;
}

/* How many lanes may write before further writes wait: one CPU is left to those who read. */
static uint32_t max_writing(uint32_t nr_lanes)
{
	long nr_cpus = sysconf(_SC_NPROCESSORS_ONLN);
	uint32_t nr = nr_cpus < (long)nr_lanes ? (uint32_t)nr_cpus : nr_lanes;

	return nr > 1 ? nr - 1 : 1;
}

int switch_create(struct fuse_switch **out, struct store *store,
		  const struct switch_options *options)
{
	size_t bytes = sizeof(struct fuse_switch) + options->nr_lanes * sizeof(struct lane);
	struct fuse_switch *sw;
	int rv;

	if (!options_are_valid(options))
		return -EINVAL;
	sw = aligned_alloc(_Alignof(struct fuse_switch), bytes);
	if (!sw)
		return -ENOMEM;
	memset(sw, 0, bytes);
	sw->store = store;
	sw->options = *options;
	sw->file_bytes = store->nr_pages * PAGE_BYTES;
	pthread_mutex_init(&sw->token, NULL);
	pthread_mutex_init(&sw->backlog.lock, NULL);
	sw->backlog.max_writing = max_writing(options->nr_lanes);
	sw->journal = store_journal(store);
	for (uint32_t i = 0; i < options->nr_lanes; i++) {
		sw->lanes[i].sw = sw;
		sw->lanes[i].journal = &sw->journal->lanes[i];
		journal_end(sw->lanes[i].journal);
	}
	sw->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	rv = sw->wake_fd < 0 ? -errno : map_memory(sw);
	if (rv)
		switch_destroy(sw);
	else
		*out = sw;
	return rv;
}

void switch_destroy(struct fuse_switch *sw)
{
	if (sw->memory)
		munmap(sw->memory, sw->memory_bytes);
	free(sw->buffers);
	if (sw->wake_fd >= 0)
		close(sw->wake_fd);
	pthread_mutex_destroy(&sw->backlog.lock);
	pthread_mutex_destroy(&sw->token);
	free(sw);
}

static int start_thread(pthread_t *out, void *(*run)(void *), void *arg, const char *name)
{
	pthread_attr_t attr;
	sigset_t all, old;
	int rv;

	sigfillset(&all);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	rv = pthread_create(out, &attr, run, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attr);
	if (!rv)
		pthread_setname_np(*out, name);
	return -rv;
}

static void join_threads(struct fuse_switch *sw, uint32_t nr_lanes)
{
	for (uint32_t i = 0; i < nr_lanes; i++)
		pthread_join(sw->lanes[i].thread, NULL);
	/* Only now: until here pyfuse3 has somebody who takes its replies, and cannot hang. */
	atomic_store(&sw->relay_stop, true);
	eventfd_write(sw->wake_fd, 1);
	pthread_join(sw->relay, NULL);
}

/*
 * Take over from an earlier worker: what it had read and not answered shall come again. An error
 * of the kernel's (no RESEND before Linux 6.9) leaves those requests without an answer.
 */
static void resume(struct fuse_switch *sw)
{
	struct fuse_out_header out = {.len = sizeof(out), .error = NOTIFY_RESEND};
	ssize_t rv;

	if (!init_replay(sw))
		return;
	rv = write(sw->options.fuse_fd, &out, sizeof(out));
	(void)rv;
}

/* Nobody reads before all are there: a start that fails has taken no request. */
static int start_threads(struct fuse_switch *sw)
{
	uint32_t nr = 0;
	char name[16];
	int rv = start_thread(&sw->relay, relay_run, sw, "zs-relay");

	if (rv)
		return rv;
	pthread_mutex_lock(&sw->token);
	while (nr < sw->options.nr_lanes) {
		snprintf(name, sizeof(name), "zs-lane/%u", nr % SWITCH_MAX_LANES);
		rv = start_thread(&sw->lanes[nr].thread, lane_run, &sw->lanes[nr], name);
		if (rv)
			break;
		nr++;
	}
	sw->ended = rv != 0;
	pthread_mutex_unlock(&sw->token);
	if (rv)
		join_threads(sw, nr);
	return rv;
}

int switch_start(struct fuse_switch **out, struct store *store,
		 const struct switch_options *options)
{
	struct fuse_switch *sw;
	int rv = switch_create(&sw, store, options);

	if (rv)
		return rv;
	resume(sw);
	rv = start_threads(sw);
	if (rv)
		switch_destroy(sw);
	else
		*out = sw;
	return rv;
}

int switch_ready(const struct fuse_switch *sw)
{
	return atomic_load(&sw->ready);
}

int switch_join(struct fuse_switch *sw)
{
	int rv;

	join_threads(sw, sw->options.nr_lanes);
	rv = sw->error;
	switch_destroy(sw);
	return rv;
}
