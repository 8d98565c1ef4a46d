/* SPDX-License-Identifier: MIT
 *
 * region_check - do header, maps and lists of chunks hold what region.h promises?
 */
#include "region.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define MESSAGE_BYTES 160

#define FAULT(message, ...) (snprintf(message, MESSAGE_BYTES, __VA_ARGS__), -EUCLEAN)

static int check_header(const struct region *region, char *message)
{
	const struct region_header *h = region->header;

	if (memcmp(&h->geometry, &region->geometry, sizeof(h->geometry)) ||
	    memcmp(&h->geometry_copy, &region->geometry, sizeof(h->geometry)))
		return FAULT(message, "the header is damaged");
	for (uint64_t n = 0; &region->map[n] < region->map_copy; n++)
		if (region->map[n] != region->map_copy[n])
			return FAULT(message, "the two maps of touched slots differ at page %llu",
				     (unsigned long long)(n * TABLE_SLOTS * 64));
	return 0;
}

/* Walk a list; @nr is how many chunks in @state there are, so that no walk is endless. */
static int check_list(const struct region *region, uint32_t c, enum chunk_state state, uint32_t nr,
		      char *message)
{
	while (c != CHUNK_NONE) {
		if (c >= region_nr_touched(region) || region->chunks[c].state != state || !nr--)
			return FAULT(message, "a list of chunks in state %d leads astray at %u",
				     (int)state, c);
		c = region->chunks[c].next;
	}
	if (nr)
		return FAULT(message, "%u chunks in state %d are in no list", nr, (int)state);
	return 0;
}

static int check_ready(const struct region *region, char *message)
{
	for (uint32_t c = 0; c < region_nr_touched(region); c++) {
		const char *bytes = (const char *)region->arena + (size_t)c * region->chunk_bytes;

		if (region->chunks[c].state == CHUNK_READY &&
		    (bytes[0] || memcmp(bytes, bytes + 1, region->chunk_bytes - 1)))
			return FAULT(message, "chunk %u in reserve is not zeroed", c);
	}
	return 0;
}

static int check_chunks(const struct region *region, char *message)
{
	uint32_t nr[CHUNK_KEPT + 1] = {0};
	int rv;

	for (uint32_t c = 0; c < region_nr_touched(region); c++) {
		uint32_t state = region->chunks[c].state;

		if (state >= CHUNK_KEPT)
			return FAULT(message, "chunk %u is in no state: %u", c, state);
		nr[state]++;
	}
	if (nr[CHUNK_READY] != region->nr_ready ||
	    nr[CHUNK_USED] + nr[CHUNK_WHOLE] != region->nr_used)
		return FAULT(message, "%u chunks in reserve and %u in use, not %u and %u",
			     nr[CHUNK_READY], nr[CHUNK_USED] + nr[CHUNK_WHOLE], region->nr_ready,
			     region->nr_used);
	rv = check_list(region, region->ready, CHUNK_READY, nr[CHUNK_READY], message);
	if (!rv)
		rv = check_list(region, region->holes, CHUNK_HOLE, nr[CHUNK_HOLE], message);
	if (!rv)
		rv = check_list(region, region->stale, CHUNK_STALE, nr[CHUNK_STALE], message);
	return rv ? rv : check_ready(region, message);
}

int region_check(struct region *region, char *message)
{
	int rv = check_header(region, message);

	pthread_mutex_lock(&region->lock);
	if (!rv)
		rv = check_chunks(region, message);
	pthread_mutex_unlock(&region->lock);
	return rv;
}
