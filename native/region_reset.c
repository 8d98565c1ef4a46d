/* SPDX-License-Identifier: MIT
 *
 * region_reset - of the chunks that a dead worker left: which are still good for something
 */
#define _GNU_SOURCE
#include "region.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory.h"

/* Memory that may hold content must not, whatever the OS says. What is a hole is left one. */
static void punch_or_clear(struct region *region, uint64_t offset, uint64_t bytes)
{
	off_t at = (off_t)(region->geometry.arena_off + offset);
	off_t end = at + (off_t)bytes;

	if (!region_drop(region, offset, bytes))
		return;
	while (at < end && (at = lseek(region->fd, at, SEEK_DATA)) >= 0 && at < end) {
		off_t hole = lseek(region->fd, at, SEEK_HOLE);

		if (hole < 0 || hole > end)
			hole = end;
		memset((char *)region->header + at, 0, (size_t)(hole - at));
		at = hole;
	}
}

static uint64_t resident_pages(const struct region *region)
{
	struct stat st = {0};

	fstat(region->fd, &st);
	return (uint64_t)st.st_blocks * 512 / PAGE_BYTES;
}

/* Punch what is unused, in runs as long as can be; the last one ends with the region. */
static void punch_unused(struct region *region, uint32_t nr_chunks)
{
	uint32_t from = 0;

	for (uint32_t c = 0; c <= nr_chunks; c++) {
		uint32_t to = c < nr_chunks ? c : region->nr_chunks;

		if (c < nr_chunks && region->chunks[c].state == CHUNK_HOLE)
			continue;
		if (from < to)
			punch_or_clear(region, (uint64_t)from * region->chunk_bytes,
				       (uint64_t)(to - from) * region->chunk_bytes);
		from = c + 1;
	}
}

/* Entries of the chunk table that are there to be read: chunks are touched in rising order. */
static uint32_t count_entries(const struct region *region)
{
	const struct region_geometry *g = &region->geometry;
	off_t end = lseek(region->fd, (off_t)g->chunk_off, SEEK_HOLE);
	uint64_t nr = end < 0 ? 0 : ((uint64_t)end - g->chunk_off) / sizeof(struct chunk);

	return nr < region->nr_chunks ? (uint32_t)nr : region->nr_chunks;
}

static bool is_populated(const struct region *region, void *chunk)
{
	unsigned char pages[STORE_MAX_CHUNK_BYTES / PAGE_BYTES];

	/* Where the OS has larger pages it tells of fewer. */
	memset(pages, 1, sizeof(pages));
	if (mincore(chunk, region->chunk_bytes, pages))
		return false;
	for (uint32_t i = 0; i < region->chunk_bytes / PAGE_BYTES; i++)
		if (!(pages[i] & 1))
			return false;
	return true;
}

/* Is a chunk in the reserve, from now on at least? The state may be damaged: what it says is not
 * believed, but made true. */
static bool keep_ready(struct region *region, uint32_t c)
{
	char *chunk = (char *)region->arena + (uint64_t)c * region->chunk_bytes;

	if (region->chunks[c].state != CHUNK_READY ||
	    region->nr_ready >= region_reserve_target(region) || !is_populated(region, chunk))
		return false;
	memory_populate(chunk, region->chunk_bytes);
	memset(chunk, 0, region->chunk_bytes);
	region->nr_ready++;
	return true;
}

static bool in_use(const struct region *region, uint32_t c)
{
	enum chunk_state state = region->chunks[c].state;

	return state == CHUNK_USED || state == CHUNK_WHOLE;
}

/* What is neither in use nor kept becomes a HOLE. Returns the chunks up to the last that is not. */
static uint32_t settle_states(struct region *region, uint32_t nr_chunks)
{
	uint32_t nr = count_entries(region);
	uint32_t touched = nr_chunks;

	for (uint32_t c = 0; c < nr_chunks; c++)
		region->nr_used += in_use(region, c);
	for (uint32_t c = 0; c < nr || c < nr_chunks; c++) {
		if (c < nr_chunks && in_use(region, c))
			continue;
		if (!keep_ready(region, c))
			region->chunks[c].state = CHUNK_HOLE;
		else if (c >= touched)
			touched = c + 1;
	}
	return touched;
}

void region_reset_chunks(struct region *region, uint32_t nr_chunks)
{
	uint64_t before = resident_pages(region);
	uint32_t touched;

	pthread_mutex_lock(&region->lock);
	region->ready = region->holes = region->stale = CHUNK_NONE;
	region->nr_ready = region->nr_used = 0;
	touched = settle_states(region, nr_chunks);
	for (uint32_t c = touched; c-- > 0;)
		if (region->chunks[c].state == CHUNK_READY)
			region_list_push(region, &region->ready, c, CHUNK_READY);
		else if (!in_use(region, c))
			region_list_push(region, &region->holes, c, CHUNK_HOLE);
	punch_unused(region, touched);
	atomic_store(&region->nr_touched, touched);
	pthread_mutex_unlock(&region->lock);
	before -= resident_pages(region);
	if ((int64_t)before > 0)
		atomic_fetch_add(&region->header->pages_returned, before);
}
