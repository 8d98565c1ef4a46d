/* SPDX-License-Identifier: MIT
 *
 * block - a block's header in memory, for the files of the arena alone
 */
#ifndef BLOCK_H
#define BLOCK_H

#include "arena.h"

#define BLOCK_FREE 0x8000U

struct block {
	uint16_t size; /* words; BLOCK_FREE */
	uint16_t prev; /* words of the block before; 0 for the chunk's first */
	union {
		struct block_tag tag; /* allocated */
		struct {	      /* free: places plus 1; 0 ends the list */
			uint16_t next_high, prev_high;
			uint32_t next_low, prev_low;
		} link;
	};
};

_Static_assert(sizeof(struct block) == 4 * BLOCK_MIN_WORDS, "a free block's header");

static inline struct block *block_at(const struct arena *arena, uint64_t place)
{
	return (struct block *)(arena->region->arena + place);
}

static inline uint32_t block_words(const struct block *block)
{
	return block->size & ~BLOCK_FREE;
}

static inline bool block_is_free(const struct block *block)
{
	return block->size & BLOCK_FREE;
}

static inline void block_set(struct block *block, uint32_t words, bool is_free)
{
	block->size = (uint16_t)(words | (is_free ? BLOCK_FREE : 0));
}

static inline uint64_t chunk_start(const struct arena *arena, uint32_t chunk)
{
	return (uint64_t)chunk << arena->region->chunk_shift;
}

static inline struct chunk *chunk_of(const struct arena *arena, uint64_t place)
{
	return &arena->region->chunks[arena_chunk_of(arena, place)];
}

static inline uint32_t chunk_offset(const struct arena *arena, uint64_t place)
{
	return (uint32_t)(place & (arena->region->chunk_words - 1));
}

/* The block behind, or NULL at the chunk's end. */
static inline struct block *block_next(const struct arena *arena, uint64_t place)
{
	uint32_t words = block_words(block_at(arena, place));

	if (chunk_offset(arena, place) + words >= arena->region->chunk_words)
		return NULL;
	return block_at(arena, place + words);
}

static inline uint64_t link_next(const struct block *block)
{
	return (uint64_t)block->link.next_high << 32 | block->link.next_low;
}

static inline uint64_t link_prev(const struct block *block)
{
	return (uint64_t)block->link.prev_high << 32 | block->link.prev_low;
}

static inline void link_set_next(struct block *block, uint64_t ref)
{
	block->link.next_high = (uint16_t)(ref >> 32);
	block->link.next_low = (uint32_t)ref;
}

static inline void link_set_prev(struct block *block, uint64_t ref)
{
	block->link.prev_high = (uint16_t)(ref >> 32);
	block->link.prev_low = (uint32_t)ref;
}

/* Can a link lead there: has it room for a header, in a chunk in use? */
static inline bool ref_is_valid(const struct arena *arena, uint64_t ref)
{
	const struct region *region = arena->region;

	return ref - 1 < (uint64_t)region_nr_touched(region) << region->chunk_shift &&
	       chunk_offset(arena, ref - 1) + BLOCK_MIN_WORDS <= region->chunk_words &&
	       chunk_of(arena, ref - 1)->state == CHUNK_USED;
}

/* The class that a free block of @words is in; all blocks of higher classes are larger. */
static inline uint32_t block_class(uint32_t words)
{
	if (words < ARENA_EXACT_WORDS)
		return words;
	return ARENA_EXACT_WORDS + (words - ARENA_EXACT_WORDS) / ARENA_STEP_WORDS;
}

/* The occupancy list that a chunk is in. */
static inline uint32_t chunk_occupancy(const struct arena *arena, const struct chunk *chunk)
{
	uint32_t n = chunk->live_words * ARENA_NR_OCCUPANCY / arena->region->chunk_words;

	return n < ARENA_NR_OCCUPANCY ? n : ARENA_NR_OCCUPANCY - 1;
}

#endif
