/* SPDX-License-Identifier: MIT
 *
 * arena_check - does the arena hold what the top of arena.h promises?
 */
#include "block.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define MESSAGE_BYTES 160

#define FAULT(message, ...) (snprintf(message, MESSAGE_BYTES, __VA_ARGS__), -EUCLEAN)

struct census {
	uint64_t live_words, nr_chunks, nr_whole;
	uint64_t nr_free;   /* free blocks that ought to be in a class */
	uint64_t nr_listed; /* USED chunks that ought to be in an occupancy list */
	uint64_t punched_pages;
};

static bool is_zero(const void *bytes, size_t nr)
{
	const char *p = bytes;

	return nr == 0 || (p[0] == 0 && memcmp(p, p + 1, nr - 1) == 0);
}

static int check_block(const struct arena *arena, const struct arena_block *b, bool after_free,
		       char *message)
{
	const struct block *block = block_at(arena, b->place);
	const struct chunk *chunk = &arena->region->chunks[arena_chunk_of(arena, b->place)];

	if (!b->is_free)
		return 0;
	if (after_free)
		return FAULT(message, "free block %llu follows a free block",
			     (unsigned long long)b->place);
	/* To look at OS pages that went back would bring them back. */
	if (!(chunk->flags & CHUNK_PUNCHED) &&
	    !is_zero(block + 1, b->words * 4ULL - sizeof(*block)))
		return FAULT(message, "free block %llu is not zeroed",
			     (unsigned long long)b->place);
	return 0;
}

static int check_chunk(const struct arena *arena, uint32_t c, struct census *census, char *message)
{
	const struct chunk *chunk = &arena->region->chunks[c];
	struct arena_block b = {.place = chunk_start(arena, c)};
	uint32_t live = 0, nr = 0, prev = 0;
	bool after_free = false;
	int rv;

	while ((rv = arena_walk(arena, c, &b)) > 0) {
		if (block_at(arena, b.place)->prev != prev)
			return FAULT(message, "block %llu does not know the block before",
				     (unsigned long long)b.place);
		rv = check_block(arena, &b, after_free, message);
		if (rv)
			return rv;
		live += b.is_free ? 0 : b.words;
		nr += !b.is_free;
		census->nr_free += b.is_free && !chunk->flags;
		after_free = b.is_free;
		prev = b.words;
		b.place += b.words;
	}
	if (rv)
		return FAULT(message, "chunk %u is not tiled by its blocks", c);
	if (!nr || live != chunk->live_words || nr != chunk->nr_blocks)
		return FAULT(message, "chunk %u counts %u blocks of %u words, holds %u of %u", c,
			     chunk->nr_blocks, chunk->live_words, nr, live);
	census->live_words += live;
	census->nr_listed += !chunk->flags;
	census->punched_pages += chunk->punched;
	return 0;
}

static int check_class(const struct arena *arena, uint32_t class, uint64_t *nr, char *message)
{
	bool mapped = arena->class_maps[class / 64] >> class % 64 & 1;
	uint64_t before = 0;

	if (mapped != (arena->classes[class] != 0) ||
	    (arena->class_map >> class / 64 & 1) != (arena->class_maps[class / 64] != 0))
		return FAULT(message, "class %u: bitmap and list disagree", class);
	for (uint64_t ref = arena->classes[class]; ref; (*nr)++) {
		const struct block *block = block_at(arena, ref - 1);

		if (!ref_is_valid(arena, ref) || !block_is_free(block) ||
		    block_class(block_words(block)) != class || link_prev(block) != before ||
		    arena->region->chunks[arena_chunk_of(arena, ref - 1)].flags)
			return FAULT(message, "class %u lists block %llu wrongly", class,
				     (unsigned long long)(ref - 1));
		before = ref;
		ref = link_next(block);
	}
	return 0;
}

static int check_occupancy(const struct arena *arena, uint32_t n, uint64_t *nr, char *message)
{
	const struct chunk *chunks = arena->region->chunks;
	uint32_t before = CHUNK_NONE;

	for (uint32_t c = arena->occupancy[n]; c != CHUNK_NONE; c = chunks[c].next) {
		if (c >= region_nr_touched(arena->region) || chunks[c].state != CHUNK_USED ||
		    chunks[c].flags || chunks[c].prev != before ||
		    chunk_occupancy(arena, &chunks[c]) != n)
			return FAULT(message, "occupancy %u lists chunk %u wrongly", n, c);
		before = c;
		(*nr)++;
	}
	return 0;
}

static int check_lists(const struct arena *arena, const struct census *census, char *message)
{
	uint64_t nr_free = 0, nr_listed = 0;
	int rv = 0;

	for (uint32_t class = 0; class < ARENA_NR_CLASSES && !rv; class ++)
		rv = check_class(arena, class, &nr_free, message);
	for (uint32_t n = 0; n < ARENA_NR_OCCUPANCY && !rv; n++)
		rv = check_occupancy(arena, n, &nr_listed, message);
	if (rv)
		return rv;
	if (nr_free != census->nr_free || nr_listed != census->nr_listed)
		return FAULT(
			message, "lists hold %llu free blocks and %llu chunks, not %llu and %llu",
			(unsigned long long)nr_free, (unsigned long long)nr_listed,
			(unsigned long long)census->nr_free, (unsigned long long)census->nr_listed);
	return 0;
}

int arena_check(struct arena *arena, char *message)
{
	uint32_t touched = region_nr_touched(arena->region);
	struct census census = {0};
	int rv = 0;

	message[0] = 0;
	pthread_mutex_lock(&arena->region->keeping); /* READY and HOLE chunks are the keeper's */
	arena_lock(arena);
	rv = region_check(arena->region, message);
	for (uint32_t c = 0; c < touched && !rv; c++) {
		enum chunk_state state = arena->region->chunks[c].state;

		census.nr_chunks += state == CHUNK_USED || state == CHUNK_WHOLE;
		census.nr_whole += state == CHUNK_WHOLE;
		if (state == CHUNK_USED)
			rv = check_chunk(arena, c, &census, message);
	}
	if (!rv)
		rv = check_lists(arena, &census, message);
	if (!rv &&
	    (census.live_words != arena->live_words || census.nr_chunks != arena->nr_chunks ||
	     census.nr_whole != arena->nr_whole || census.punched_pages != arena->punched_pages))
		rv = FAULT(message, "arena counts %llu words in %llu chunks, holds %llu in %llu",
			   (unsigned long long)arena->live_words,
			   (unsigned long long)arena->nr_chunks,
			   (unsigned long long)census.live_words,
			   (unsigned long long)census.nr_chunks);
	arena_unlock(arena);
	pthread_mutex_unlock(&arena->region->keeping);
	return rv;
}
