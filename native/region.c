/* SPDX-License-Identifier: MIT
 *
 * region - see region.h for the layout and the locks
 *
 * The keeper asks the OS in two steps: fallocate() gets the memory and reports when there is
 * none (a page fault could only kill), memory_populate() then maps it, so that a lane's first
 * touch is not a fault. Measured on Linux 6.18: 1 ms each for 4 MiB; punching 4 MiB takes 0.8 ms
 * in one call and 1.2 ms in 64.
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory.h"

#define KEEPER_BATCH 256 /* chunks punched in one go */
#define KEEPER_REFILL 16 /* chunks populated in one go: one MiB, so that waiters wait briefly */
#define PATIENCE_SECONDS 1

/* Return: a chunk of a list of those in @state, now KEPT; CHUNK_NONE: the list is empty, or damaged
 * from here on. */
static uint32_t list_pop(struct region *region, uint32_t *head, enum chunk_state state)
{
	uint32_t c = *head;

	if (c >= region_nr_touched(region) || region->chunks[c].state != state) {
		*head = CHUNK_NONE;
		return CHUNK_NONE;
	}
	*head = region->chunks[c].next;
	region->chunks[c].state = CHUNK_KEPT;
	return c;
}

static uint32_t ready_pop(struct region *region)
{
	uint32_t c = list_pop(region, &region->ready, CHUNK_READY);

	region->nr_ready = c == CHUNK_NONE ? 0 : region->nr_ready - 1;
	return c;
}

uint32_t region_reserve_target(const struct region *region)
{
	uint32_t room = region->max_used - region->nr_used;

	return room < region->reserve ? room : region->reserve;
}

static uint32_t refill_level(const struct region *region)
{
	uint32_t target = region_reserve_target(region);

	return region->held ? (target + 3) / 4 : target - target / 4;
}

static bool wants_refill(const struct region *region)
{
	return region->nr_ready < refill_level(region);
}

static bool wants_return(const struct region *region)
{
	return region->nr_ready > region_reserve_target(region) + region->held ||
	       region->stale != CHUNK_NONE;
}

/* After a try that failed the keeper rests until somebody waits for another. */
static bool may_try(const struct region *region)
{
	return !region->nr_tries || region->failed_try != region->nr_tries ||
	       region->wanted_try > region->nr_tries;
}

static bool keeper_has_work(const struct region *region)
{
	return (wants_refill(region) && may_try(region)) || region->fresh ||
	       (wants_return(region) && !region->held);
}

/* Wake whoever waits for what has just changed: the keeper for work, and those who wait for a chunk,
 * who may have got one, or no reason to wait any longer. */
static void tell(struct region *region)
{
	if (keeper_has_work(region))
		pthread_cond_signal(&region->work);
	if (region->nr_ready || !wants_refill(region))
		pthread_cond_broadcast(&region->change);
}

static int compare_chunks(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a;
	uint32_t y = *(const uint32_t *)b;

	return (x > y) - (x < y);
}

/* The next run of neighbours in sorted @batch[@from..@nr-1]; returns its end. */
static uint32_t next_run(const uint32_t *batch, uint32_t from, uint32_t nr)
{
	uint32_t to = from + 1;

	while (to < nr && batch[to] == batch[to - 1] + 1)
		to++;
	return to;
}

int region_populate(struct region *region, uint64_t offset, uint64_t bytes)
{
	while (fallocate(region->fd, 0, (off_t)offset, (off_t)bytes))
		if (errno != EINTR)
			return -errno;
	memory_populate((char *)region->header + offset, bytes);
	return 0;
}

int region_drop(struct region *region, uint64_t offset, uint64_t bytes)
{
	while (fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			 (off_t)(region->geometry.arena_off + offset), (off_t)bytes))
		if (errno != EINTR)
			return -errno;
	return 0;
}

int region_punch(struct region *region, uint64_t offset, uint64_t bytes)
{
	int rv = region_drop(region, offset, bytes);

	if (rv)
		return rv;
	atomic_fetch_add(&region->header->pages_returned, bytes / PAGE_BYTES);
	return 0;
}

static uint32_t take_holes(struct region *region, uint32_t *batch)
{
	uint32_t touched = region_nr_touched(region);
	uint32_t want = region_reserve_target(region) - region->nr_ready;
	/* Where there is none, the first one is for who waits already. */
	uint32_t most = region->nr_ready ? KEEPER_REFILL : 1;
	uint32_t nr = 0;

	while (nr < want && nr < most) {
		uint32_t c = list_pop(region, &region->holes, CHUNK_HOLE);

		if (c == CHUNK_NONE && touched >= region->nr_entries)
			break;
		if (c == CHUNK_NONE) {
			c = touched++;
			region->chunks[c].state = CHUNK_KEPT;
			atomic_store_explicit(&region->nr_touched, touched, memory_order_relaxed);
		}
		batch[nr++] = c;
	}
	return nr;
}

/* Returns how many of @batch, sorted by this, are populated. */
static uint32_t populate_chunks(struct region *region, uint32_t *batch, uint32_t nr)
{
	uint32_t done = 0;

	qsort(batch, nr, sizeof(*batch), compare_chunks);
	while (done < nr) {
		uint32_t to = next_run(batch, done, nr);

		if (region_populate(region,
				    region->geometry.arena_off +
					    (uint64_t)batch[done] * region->chunk_bytes,
				    (uint64_t)(to - done) * region->chunk_bytes))
			break;
		done = to;
	}
	return done;
}

/* The first @done of @batch are populated. With region->lock. */
static void publish(struct region *region, const uint32_t *batch, uint32_t done, uint32_t nr)
{
	for (uint32_t i = nr; i-- > 0;)
		if (i < done)
			region_list_push(region, &region->ready, batch[i], CHUNK_READY);
		else
			region_list_push(region, &region->holes, batch[i], CHUNK_HOLE);
	region->nr_ready += done;
	if (done) {
		region->nr_published++;
		region->stuck = false;
	}
	pthread_cond_broadcast(&region->change);
}

/* With both locks; drops region->lock meanwhile. Returns whether all went well. */
static bool refill(struct region *region)
{
	uint32_t batch[KEEPER_REFILL];
	uint64_t try = ++region->nr_tries;
	uint32_t nr = take_holes(region, batch);
	uint32_t done;

	pthread_mutex_unlock(&region->lock);
	done = populate_chunks(region, batch, nr);
	pthread_mutex_lock(&region->lock);
	if (!done || done < nr)
		region->failed_try = try;
	publish(region, batch, done, nr);
	pthread_mutex_unlock(&region->lock);
	region_populate_entries(region, KEEPER_REFILL);
	pthread_mutex_lock(&region->lock);
	return region->failed_try != try;
}

/* With both locks; drops region->lock meanwhile. */
static void return_surplus(struct region *region)
{
	uint32_t batch[KEEPER_BATCH];
	uint32_t nr = 0;

	while (nr < KEEPER_BATCH && wants_return(region)) {
		uint32_t c = list_pop(region, &region->stale, CHUNK_STALE);

		if (c == CHUNK_NONE)
			c = ready_pop(region);
		if (c != CHUNK_NONE)
			batch[nr++] = c;
	}
	pthread_mutex_unlock(&region->lock);
	qsort(batch, nr, sizeof(*batch), compare_chunks);
	for (uint32_t from = 0, to; from < nr; from = to) {
		to = next_run(batch, from, nr);
		region_punch(region, (uint64_t)batch[from] * region->chunk_bytes,
			     (uint64_t)(to - from) * region->chunk_bytes);
	}
	pthread_mutex_lock(&region->lock);
	for (uint32_t i = nr; i-- > 0;)
		region_list_push(region, &region->holes, batch[i], CHUNK_HOLE);
	pthread_cond_broadcast(&region->change);
}

/* All that there is to refill with has to be punched first: that is no try that fails. */
static bool only_stale(const struct region *region)
{
	return region->stale != CHUNK_NONE && region->holes == CHUNK_NONE &&
	       region_nr_touched(region) == region->nr_chunks;
}

/* A batch at a time, each of which wakes who waits for it. With both locks. */
static void fill_reserve(struct region *region)
{
	bool good = true;

	while (good && !region->stop && !only_stale(region) &&
	       region->nr_ready < region_reserve_target(region))
		good = refill(region);
}

static void *keeper_main(void *arg)
{
	struct region *region = arg;

	memory_touch_stack();
	pthread_mutex_lock(&region->lock);
	while (!region->stop) {
		if (!keeper_has_work(region)) {
			pthread_cond_wait(&region->work, &region->lock);
			continue;
		}
		/* keeping comes before lock; what is wanted may change in between. */
		pthread_mutex_unlock(&region->lock);
		pthread_mutex_lock(&region->keeping);
		region_populate_entries(region, KEEPER_REFILL);
		pthread_mutex_lock(&region->lock);
		/* First what comes back: near the limit, stale chunks are all there is to refill with. */
		if (wants_return(region) && (!region->held || wants_refill(region)))
			return_surplus(region);
		if (wants_refill(region))
			fill_reserve(region);
		if (region->fresh)
			region_populate_tables(region);
		pthread_mutex_unlock(&region->lock);
		pthread_mutex_unlock(&region->keeping);
		pthread_mutex_lock(&region->lock);
	}
	pthread_mutex_unlock(&region->lock);
	return NULL;
}

int region_start_keeper(struct region *region)
{
	sigset_t all;
	sigset_t old;
	int rv;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	rv = pthread_create(&region->keeper, NULL, keeper_main, region);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rv) {
		region->keeper = 0;
		return -EAGAIN;
	}
	pthread_setname_np(region->keeper, "zs-keeper");
	return 0;
}

void region_destroy(struct region *region)
{
	pthread_mutex_lock(&region->lock);
	region->stop = true;
	pthread_cond_broadcast(&region->work);
	pthread_mutex_unlock(&region->lock);
	if (region->keeper)
		pthread_join(region->keeper, NULL);
	munmap(region->header, region->geometry.total_bytes);
	pthread_cond_destroy(&region->change);
	pthread_cond_destroy(&region->work);
	pthread_mutex_destroy(&region->lock);
	pthread_mutex_destroy(&region->keeping);
	free(region->ahead);
	free(region);
}

static void note_max_used(struct region *region)
{
	uint64_t bytes = (uint64_t)region->nr_used * region->chunk_bytes;

	if (bytes > atomic_load_explicit(&region->header->max_used_bytes, memory_order_relaxed))
		atomic_store_explicit(&region->header->max_used_bytes, bytes, memory_order_relaxed);
}

static bool has_ready(const struct region *region, bool compacting)
{
	return region->nr_ready > (compacting ? refill_level(region) / 2 : 0);
}

/* Cap on USED chunks. What compaction has taken of what is held back for it is not the writers'
 * loss. */
static uint32_t used_cap(const struct region *region, bool compacting)
{
	uint32_t lent = region->nr_lent > 0 ? (uint32_t)region->nr_lent : 0;
	uint32_t back = region->spare;

	if (back < region->nr_promised)
		back = region->nr_promised;
	return region->max_used - (compacting || back < lent ? 0 : back - lent);
}

/* No round, or a new one. */
static void end_round(struct region *region)
{
	region->nr_promised = 0;
	region->nr_lent = 0;
}

int region_take_chunk(struct region *region, bool compacting, uint32_t *chunk)
{
	int rv = 0;

	pthread_mutex_lock(&region->lock);
	if (region->nr_used >= used_cap(region, compacting)) {
		rv = -ENOSPC;
	} else if (!has_ready(region, compacting) || (*chunk = ready_pop(region)) == CHUNK_NONE) {
		rv = -EAGAIN;
	} else {
		region->chunks[*chunk].state = CHUNK_USED;
		region->nr_used++;
		region->nr_lent += compacting;
		note_max_used(region);
	}
	tell(region);
	pthread_mutex_unlock(&region->lock);
	return rv;
}

static void begin_patience(const struct region *region, struct region_patience *patience)
{
	clock_gettime(CLOCK_MONOTONIC, &patience->until);
	patience->until.tv_sec += PATIENCE_SECONDS;
	patience->nr_published = region->nr_published;
}

int region_wait_ready(struct region *region, bool compacting, struct region_patience *patience)
{
	uint64_t arrived;
	int rv = 0;

	pthread_mutex_lock(&region->lock);
	if (!patience->until.tv_sec)
		begin_patience(region, patience);
	/* What failed before, or is failing now, says nothing about memory that came back since. */
	arrived = region->nr_tries;
	region->wanted_try = arrived + 1;
	pthread_cond_signal(&region->work);
	while (!has_ready(region, compacting) && wants_refill(region) && !region->stuck &&
	       region->failed_try <= arrived && rv != ETIMEDOUT)
		rv = pthread_cond_timedwait(&region->change, &region->lock, &patience->until);
	if (rv == ETIMEDOUT && region->nr_published == patience->nr_published) {
		region->stuck = true;
		pthread_cond_broadcast(&region->change);
	}
	rv = has_ready(region, compacting) ? 0 : -ENOSPC;
	pthread_mutex_unlock(&region->lock);
	return rv;
}

static void note_given(struct region *region, uint32_t chunk)
{
	if (region->chunks[chunk].flags & CHUNK_ISOLATED)
		region->nr_lent--;
}

void region_give_chunk(struct region *region, uint32_t chunk)
{
	pthread_mutex_lock(&region->lock);
	region_list_push(region, &region->ready, chunk, CHUNK_READY);
	region->nr_ready++;
	region->nr_used--;
	tell(region);
	note_given(region, chunk);
	pthread_mutex_unlock(&region->lock);
}

void region_give_punched(struct region *region, uint32_t chunk)
{
	/* The whole chunk will be counted as returned; these pages were before. */
	atomic_fetch_sub(&region->header->pages_returned, region->chunks[chunk].punched);
	pthread_mutex_lock(&region->lock);
	region_list_push(region, &region->stale, chunk, CHUNK_STALE);
	region->nr_used--;
	tell(region);
	note_given(region, chunk);
	pthread_mutex_unlock(&region->lock);
}

void region_settle(struct region *region)
{
	pthread_mutex_lock(&region->keeping);
	pthread_mutex_lock(&region->lock);
	while (wants_return(region))
		return_surplus(region);
	pthread_mutex_unlock(&region->lock);
	pthread_mutex_unlock(&region->keeping);
}

void region_replenish(struct region *region)
{
	pthread_mutex_lock(&region->keeping);
	region_populate_entries(region, KEEPER_REFILL);
	pthread_mutex_lock(&region->lock);
	fill_reserve(region);
	pthread_mutex_unlock(&region->lock);
	pthread_mutex_unlock(&region->keeping);
}

void region_hold(struct region *region, uint32_t chunks)
{
	pthread_mutex_lock(&region->lock);
	region->held = chunks;
	tell(region);
	pthread_mutex_unlock(&region->lock);
}

void region_end_round(struct region *region)
{
	pthread_mutex_lock(&region->lock);
	end_round(region);
	pthread_mutex_unlock(&region->lock);
}

uint32_t region_compaction_budget(struct region *region)
{
	uint32_t level, nr, cap, most;

	pthread_mutex_lock(&region->lock);
	end_round(region);
	level = refill_level(region);
	nr = region->nr_ready > level ? region->nr_ready - level : 1;
	cap = used_cap(region, false);
	most = region->spare + (region->nr_used < cap ? (cap - region->nr_used) / 2 : 0);
	if (nr > most)
		nr = most ? most : 1;
	region->nr_promised = nr;
	pthread_mutex_unlock(&region->lock);
	return nr;
}

/* Bytes of @fd from 0 to @end that are not holes. */
static uint64_t resident_bytes(int fd, uint64_t end)
{
	uint64_t sum = 0;
	off_t at = 0;

	while ((uint64_t)at < end) {
		off_t data = lseek(fd, at, SEEK_DATA);

		if (data < 0 || (uint64_t)data >= end)
			break;
		at = lseek(fd, data, SEEK_HOLE);
		if (at < 0 || (uint64_t)at > end)
			at = (off_t)end;
		sum += (uint64_t)(at - data);
	}
	return sum;
}

void region_usage(struct region *region, uint64_t *arena, uint64_t *tables, uint64_t *reserve)
{
	struct stat st = {0};
	uint64_t ready;

	pthread_mutex_lock(&region->keeping);
	*tables = resident_bytes(region->fd, region->geometry.arena_off);
	pthread_mutex_lock(&region->lock);
	fstat(region->fd, &st);
	ready = (uint64_t)region->nr_ready * region->chunk_bytes;
	*reserve = (uint64_t)region_reserve_target(region) * region->chunk_bytes;
	if (*reserve > ready)
		*reserve = ready;
	pthread_mutex_unlock(&region->lock);
	pthread_mutex_unlock(&region->keeping);
	*arena = (uint64_t)st.st_blocks * 512;
	*arena -= *arena > *tables + *reserve ? *tables + *reserve : *arena;
}
