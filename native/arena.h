/* SPDX-License-Identifier: MIT
 *
 * arena - variable-sized blocks in chunks; knows no pages of the file
 *
 * Descends from xvmalloc (Nitin Gupta, compcache): segregated free lists under two levels of
 * bitmaps, boundary tags, immediate coalescing. Two things differ: blocks live in chunks of up
 * to 64 KiB instead of OS pages, and a block names its owner, so that it can be moved.
 *
 *   chunk:  | block | block | free     | block | free |
 *   block:  size 16, prev 16, owner 32, checksum 32, payload ...
 *   free:   size 16 (bit 15 set), prev 16, next free 48, previous free 48, zeroes ...
 *
 * Sizes and prev (the size of the block before, 0 at the chunk's start) count 4-byte words,
 * header included. A place is a block's offset from the arena's start in words.
 *
 * Between two calls:
 *  - the blocks of a USED chunk tile it exactly, and each one's prev is the size of the one before;
 *  - no two free blocks are neighbours;
 *  - each free block is in the free list of its size class, unless its chunk is ISOLATED or
 *    PUNCHED;
 *  - all bytes of a free block behind its header are zero: what is freed is gone;
 *  - a chunk without allocated blocks is not USED: it went back to the region;
 *  - each USED chunk is in the list of its occupancy, or of PUNCHED ones, unless it is ISOLATED.
 *
 * The free lists are searched best fit: classes are exact up to the largest page block, so a
 * request gets the smallest free block that holds it, in two bit scans.
 *
 * Where a chunk is an OS page (the classic arena), a raw page does not fit beside a header: it
 * gets a chunk of its own, state WHOLE, and its tag moves to the chunk table.
 */
#ifndef ARENA_H
#define ARENA_H

#include "region.h"

#define BLOCK_HEADER_BYTES 12
#define BLOCK_MIN_WORDS 4 /* a free block's header */

#define ARENA_EXACT_WORDS 1088 /* exact classes below; the largest page block is 1027 */
#define ARENA_STEP_WORDS 64    /* width of the classes above */
#define ARENA_NR_CLASSES (ARENA_EXACT_WORDS + (16384 - ARENA_EXACT_WORDS) / ARENA_STEP_WORDS + 1)
#define ARENA_MAP_WORDS ((ARENA_NR_CLASSES + 63) / 64)
#define ARENA_NR_OCCUPANCY 256 /* lists of chunks, by how many 256ths of their words are live */

/* What the store keeps of a block; in its header, or in the chunk table where it is WHOLE. */
struct block_tag {
	uint32_t owner;
	uint32_t checksum;
};

struct arena {
	pthread_mutex_t lock;	  /* arena_lock(), arena_yield_lock() */
	_Atomic uint32_t waiting; /* threads that want it for a page request */
	struct region *region;
	uint64_t class_map;
	uint64_t class_maps[ARENA_MAP_WORDS];
	uint64_t classes[ARENA_NR_CLASSES];	/* place of the first free block, plus 1 */
	uint32_t occupancy[ARENA_NR_OCCUPANCY]; /* first USED chunk of each */
	uint32_t trimmed;			/* first PUNCHED chunk */
	uint64_t punched_pages;			/* in all of them */
	uint64_t live_words;			/* in USED chunks, headers included */
	uint64_t freed_words;			/* ever; compaction's moves included */
	uint64_t nr_chunks;			/* USED and WHOLE */
	uint64_t nr_whole;
	uint64_t nr_damaged; /* blocks whose tags made no sense when they were freed */
	bool has_whole;
};

/** arena_init - an arena without chunks over @region. Return: 0. */
int arena_init(struct arena *arena, struct region *region);
void arena_fini(struct arena *arena);

/*
 * The lock is held for microseconds and waking a sleeper takes tens of them, so whoever wants it
 * spins first. Compaction takes it with arena_yield_lock(), which lets all others go before.
 */
void arena_lock(struct arena *arena);
void arena_yield_lock(struct arena *arena);
void arena_unlock(struct arena *arena);

/**
 * arena_alloc - get a block
 * @bytes: payload, 1 to PAGE_BYTES
 * @owner: written to its tag
 * @compacting: see region_take_chunk()
 *
 * Context: arena->lock held.
 * Return: 0, -EAGAIN (region_wait_ready() without the lock, then again), -ENOSPC.
 */
int arena_alloc(struct arena *arena, uint32_t bytes, uint32_t owner, bool compacting,
		uint64_t *place);

/**
 * arena_free - free a block whose payload the caller has zeroed (see arena_wipe())
 *
 * A block whose tags do not fit its neighbours' is left alone and counted in nr_damaged.
 *
 * Context: arena->lock held.
 * Return: 0, -EUCLEAN (left alone).
 */
int arena_free(struct arena *arena, uint64_t place);

/** arena_wipe - zero a block's payload. Context: the block is the caller's alone; no lock. */
void arena_wipe(struct arena *arena, uint64_t place, uint32_t bytes);

/** arena_holds - can @place be a block with @bytes of payload? Says so without a lock, from what
 * does not change while the block is allocated. */
bool arena_holds(const struct arena *arena, uint64_t place, uint32_t bytes);

struct block_tag *arena_tag(const struct arena *arena, uint64_t place);
void *arena_payload(const struct arena *arena, uint64_t place);

/**
 * arena_isolate - take a chunk's free blocks and the chunk itself off all lists
 *
 * Nothing is allocated from an isolated chunk; frees in it go on. The last one gives it back.
 *
 * Context: arena->lock held; the chunk is USED.
 * Return: 0, -EUCLEAN (its blocks do not tile it: it stays ISOLATED until store_rebuild(), so that
 * compaction does not meet it again).
 */
int arena_isolate(struct arena *arena, uint32_t chunk);

/** arena_unisolate - the reverse. Context: arena->lock held; the chunk is USED and ISOLATED. */
void arena_unisolate(struct arena *arena, uint32_t chunk);

/** arena_mark_punched - @pages OS pages inside free blocks of an ISOLATED chunk are going back;
 * nothing will be allocated from it. Context: arena->lock held. */
void arena_mark_punched(struct arena *arena, uint32_t chunk, uint32_t pages);

/** arena_sparsest - Return: a PUNCHED chunk, else the one with the fewest live words, or CHUNK_NONE.
 * Context: arena->lock held. */
uint32_t arena_sparsest(struct arena *arena);

struct arena_block {
	uint64_t place;
	uint32_t words; /* header included */
	uint32_t owner; /* of an allocated block */
	bool is_free;
};

/**
 * arena_walk - step over the blocks of a chunk
 * @block: place is where to look; the rest is filled in
 *
 * Context: arena->lock held.
 * Return: 1, 0 (past the chunk's last block), -EUCLEAN (tags make no sense).
 */
int arena_walk(const struct arena *arena, uint32_t chunk, struct arena_block *block);

/* One allocated block, as the slot table knows it. */
struct arena_claim {
	uint64_t place;
	uint32_t bytes;
	uint32_t owner;
};

/**
 * arena_rebuild_chunk - recreate a chunk's headers from its allocated blocks
 * @claims: in order of place, inside the chunk, not overlapping
 *
 * Tags of the claimed blocks are kept, everything between them becomes free and zero. The chunk
 * becomes USED and is listed.
 */
void arena_rebuild_chunk(struct arena *arena, uint32_t chunk, const struct arena_claim *claims,
			 uint32_t nr);

/** arena_check - verify all that the top of arena.h promises. Return: 0, -EUCLEAN. */
int arena_check(struct arena *arena, char *message);

static inline uint32_t arena_words(uint32_t bytes)
{
	uint32_t words = (bytes + BLOCK_HEADER_BYTES + 3) / 4;

	return words < BLOCK_MIN_WORDS ? BLOCK_MIN_WORDS : words;
}

/* Words in free blocks of chunks in use. Context: arena->lock held. */
static inline uint64_t arena_free_words(const struct arena *arena)
{
	return (arena->nr_chunks - arena->nr_whole) * arena->region->chunk_words -
	       arena->live_words - arena->punched_pages * (PAGE_BYTES / 4);
}

static inline uint32_t arena_chunk_of(const struct arena *arena, uint64_t place)
{
	return (uint32_t)(place >> arena->region->chunk_shift);
}

#endif
