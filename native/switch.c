/* SPDX-License-Identifier: MIT
 *
 * switch - lanes and relay: their threads, from start to unmount; see switch.h
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
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_LANES 64
#define MAX_REQUEST_BYTES (1U << 20)
#define STACK_BYTES (256U << 10)

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void *map_memory(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (at == MAP_FAILED)
		return NULL;
	madvise(at, bytes, MADV_DONTDUMP);
	return at;
}

static size_t lane_bytes(const struct fuse_switch *sw)
{
	return 2 * (PAGE_BYTES + (size_t)sw->options.max_request_bytes);
}

static size_t relay_bytes(void)
{
	return BACKLOG_BYTES + PAGE_BYTES;
}

/* The end of serving, whatever brought it; the first caller's reason counts. */
static void end(struct fuse_switch *sw, int error)
{
	if (atomic_exchange(&sw->stopping, true))
		return;
	atomic_store(&sw->error, error);
	eventfd_write(sw->wake_fd, 1);
	eventfd_write(sw->options.end_fd, 1);
}

/* With the token: the next request. Return: its length, or -errno of the end. */
static ssize_t read_request(struct lane *lane)
{
	struct fuse_switch *sw = lane->sw;
	struct pollfd poll_fd = {.fd = sw->options.fuse_fd, .events = POLLIN};

	for (;;) {
		ssize_t n = read(poll_fd.fd, lane->in, switch_request_bytes(sw));
		uint64_t now = now_us();

		if (n > 0) {
			sw->last_us = now;
			return n;
		}
		if (n == 0)
			return -ENODEV;
		/* ENOENT: the request was given up while it was read. */
		if (errno == EINTR || errno == ENOENT)
			continue;
		if (errno != EAGAIN)
			return -errno;
		if (now - sw->last_us >= sw->options.spin_us)
			poll(&poll_fd, 1, -1);
	}
}

static void *lane_main(void *arg)
{
	struct lane *lane = arg;
	struct fuse_switch *sw = lane->sw;

	pthread_mutex_lock(&sw->token);
	while (!atomic_load(&sw->stopping)) {
		ssize_t n = read_request(lane);
		bool is_long;

		if (n < 0) {
			end(sw, n == -ENODEV ? 0 : (int)n);
			break;
		}
		is_long = switch_is_long(lane->in, (size_t)n);
		if (is_long)
			pthread_mutex_unlock(&sw->token);
		switch_serve(lane, (size_t)n);
		if (is_long)
			pthread_mutex_lock(&sw->token);
	}
	pthread_mutex_unlock(&sw->token);
	return NULL;
}

/* One reply of pyfuse3's to the kernel. Return: false when pyfuse3 is gone. */
static bool relay_reply(struct fuse_switch *sw)
{
	const struct fuse_out_header *out = (const struct fuse_out_header *)sw->relay_buffer;
	ssize_t n = recv(sw->options.socket_fd, sw->relay_buffer, relay_bytes(), MSG_DONTWAIT);
	ssize_t rv;
	bool is_init;

	if (n <= 0)
		return n < 0 && (errno == EAGAIN || errno == EINTR);
	if ((size_t)n < sizeof(*out))
		return true;
	is_init = out->unique && out->unique == atomic_load(&sw->init_unique);
	if (is_init)
		n = (ssize_t)switch_change_init(sw, sw->relay_buffer, (size_t)n);
	do
		rv = write(sw->options.fuse_fd, sw->relay_buffer, (size_t)n);
	while (rv < 0 && errno == EINTR);
	if (is_init && rv == n && !out->error)
		atomic_store(&sw->ready, true);
	return true;
}

static void *relay_main(void *arg)
{
	struct fuse_switch *sw = arg;
	bool alive = true;

	while (!atomic_load(&sw->stopping)) {
		bool full = alive && backlog_send(sw);
		struct pollfd fds[2] = {
			{.fd = sw->wake_fd, .events = POLLIN},
			{.fd = alive ? sw->options.socket_fd : -1,
			 .events = (short)(POLLIN | (full ? POLLOUT : 0))},
		};
		eventfd_t woken;

		poll(fds, 2, -1);
		if (fds[0].revents)
			eventfd_read(sw->wake_fd, &woken);
		if (fds[1].revents & (POLLIN | POLLHUP | POLLERR))
			alive = relay_reply(sw);
	}
	return NULL;
}

static int start_thread(pthread_t *thread, void *(*main)(void *), void *arg, const char *name)
{
	pthread_attr_t attr;
	sigset_t all, old;
	int rv;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	rv = pthread_create(thread, &attr, main, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attr);
	if (rv)
		return -EAGAIN;
	pthread_setname_np(*thread, name);
	return 0;
}

static void free_switch(struct fuse_switch *sw)
{
	for (uint32_t i = 0; i < sw->options.nr_lanes; i++)
		if (sw->lanes[i].memory)
			munmap(sw->lanes[i].memory, lane_bytes(sw));
	if (sw->backlog.ring)
		munmap(sw->backlog.ring, BACKLOG_BYTES);
	if (sw->relay_buffer)
		munmap(sw->relay_buffer, relay_bytes());
	if (sw->wake_fd >= 0)
		close(sw->wake_fd);
	pthread_mutex_destroy(&sw->token);
	pthread_mutex_destroy(&sw->backlog.lock);
	free(sw);
}

/* The content of a WRITE or READ follows headers of 80 and 16 bytes. */
static int prepare_lane(struct fuse_switch *sw, struct lane *lane)
{
	size_t half = lane_bytes(sw) / 2;

	lane->sw = sw;
	lane->memory = map_memory(2 * half);
	if (!lane->memory)
		return -ENOMEM;
	lane->in = lane->memory + PAGE_BYTES - sizeof(struct fuse_in_header) -
		   sizeof(struct fuse_write_in);
	lane->out = lane->memory + half + PAGE_BYTES - sizeof(struct fuse_out_header);
	return 0;
}

static int prepare(struct fuse_switch *sw)
{
	int rv = 0;

	sw->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	sw->backlog.ring = map_memory(BACKLOG_BYTES);
	sw->relay_buffer = map_memory(relay_bytes());
	if (sw->wake_fd < 0 || !sw->backlog.ring || !sw->relay_buffer)
		return -ENOMEM;
	for (uint32_t i = 0; i < sw->options.nr_lanes && !rv; i++)
		rv = prepare_lane(sw, &sw->lanes[i]);
	return rv;
}

static void join_lanes(struct fuse_switch *sw, uint32_t nr)
{
	for (uint32_t i = 0; i < nr; i++)
		pthread_join(sw->lanes[i].thread, NULL);
}

static bool options_valid(const struct switch_options *o)
{
	return o->nr_lanes >= 1 && o->nr_lanes <= MAX_LANES && o->max_request_bytes >= PAGE_BYTES &&
	       o->max_request_bytes <= MAX_REQUEST_BYTES && o->max_request_bytes % PAGE_BYTES == 0;
}

int switch_start(struct fuse_switch **out, struct store *store,
		 const struct switch_options *options)
{
	struct fuse_switch *sw;
	uint32_t started = 0;
	char name[24];
	int rv;

	if (!options_valid(options))
		return -EINVAL;
	sw = calloc(1, sizeof(*sw) + options->nr_lanes * sizeof(struct lane));
	if (!sw)
		return -ENOMEM;
	sw->store = store;
	sw->options = *options;
	pthread_mutex_init(&sw->token, NULL);
	pthread_mutex_init(&sw->backlog.lock, NULL);
	rv = prepare(sw);
	if (!rv)
		rv = start_thread(&sw->relay, relay_main, sw, "zs-relay");
	if (rv)
		goto out_free;
	/* Nobody reads before all lanes are there, so that a failure has eaten no request. */
	pthread_mutex_lock(&sw->token);
	for (; started < options->nr_lanes && !rv; started += !rv) {
		snprintf(name, sizeof(name), "zs-lane/%u", started);
		rv = start_thread(&sw->lanes[started].thread, lane_main, &sw->lanes[started], name);
	}
	if (rv) {
		atomic_store(&sw->stopping, true);
		eventfd_write(sw->wake_fd, 1);
	}
	pthread_mutex_unlock(&sw->token);
	if (!rv) {
		*out = sw;
		return 0;
	}
	join_lanes(sw, started);
	pthread_join(sw->relay, NULL);
out_free:
	free_switch(sw);
	return rv;
}

int switch_ready(const struct fuse_switch *sw)
{
	return atomic_load(&sw->ready);
}

int switch_join(struct fuse_switch *sw)
{
	int error;

	join_lanes(sw, sw->options.nr_lanes);
	pthread_join(sw->relay, NULL);
	error = atomic_load(&sw->error);
	free_switch(sw);
	return error;
}
