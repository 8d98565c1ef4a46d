/* SPDX-License-Identifier: MIT
 *
 * arena - see arena.h for the layout and what always holds
 *
 * Bottom-up: size classes, chunks, blocks, public calls.
 */
#include "block.h"

#include <errno.h>
#include <string.h>

#define CLASS_NONE UINT32_MAX

/* Does a link, or a list's head, lead to a free block? */
static bool links_to_free(const struct arena *arena, uint64_t ref)
{
	return ref_is_valid(arena, ref) && block_is_free(block_at(arena, ref - 1));
}

static void class_insert(struct arena *arena, uint64_t place)
{
	struct block *block = block_at(arena, place);
	uint32_t class = block_class(block_words(block));
	uint64_t head = arena->classes[class];

	/* Where flags of a chunk were damaged its blocks may be gone, and another's be there. */
	if (!links_to_free(arena, head) || link_prev(block_at(arena, head - 1)) ||
	    block_class(block_words(block_at(arena, head - 1))) != class)
		head = 0;
	link_set_next(block, head);
	link_set_prev(block, 0);
	if (head)
		link_set_prev(block_at(arena, head - 1), place + 1);
	arena->classes[class] = place + 1;
	arena->class_maps[class / 64] |= 1ULL << class % 64;
	arena->class_map |= 1ULL << class / 64;
}

static void class_set_head(struct arena *arena, uint32_t class, uint64_t head)
{
	arena->classes[class] = head;
	if (head)
		return;
	arena->class_maps[class / 64] &= ~(1ULL << class % 64);
	if (!arena->class_maps[class / 64])
		arena->class_map &= ~(1ULL << class / 64);
}

/* A link is followed only to a block that links back: where memory was damaged a list ends early
 * and what was behind it is out of use until store_rebuild(). */
static void class_remove(struct arena *arena, uint64_t place)
{
	struct block *block = block_at(arena, place);
	uint32_t class = block_class(block_words(block));
	uint64_t next = link_next(block);
	uint64_t prev = link_prev(block);

	if (!links_to_free(arena, next) || link_prev(block_at(arena, next - 1)) != place + 1)
		next = 0;
	if (!links_to_free(arena, prev) || link_next(block_at(arena, prev - 1)) != place + 1)
		prev = 0;
	if (next)
		link_set_prev(block_at(arena, next - 1), prev);
	if (prev)
		link_set_next(block_at(arena, prev - 1), next);
	else if (arena->classes[class] == place + 1)
		class_set_head(arena, class, next);
}

/* The smallest class with a block that surely holds @words (best fit where classes are exact). */
static uint32_t class_find(const struct arena *arena, uint32_t words)
{
	uint32_t class = block_class(words);
	uint64_t map = arena->class_maps[class / 64] & ~0ULL << class % 64;

	if (!map) {
		uint64_t upper =
			class / 64 == 63 ? 0 : arena->class_map & ~0ULL << (class / 64 + 1);

		if (!upper)
			return CLASS_NONE;
		class = (uint32_t)__builtin_ctzll(upper) * 64;
		map = arena->class_maps[class / 64];
	}
	return class / 64 * 64 + (uint32_t)__builtin_ctzll(map);
}

static uint32_t *chunk_list_head(struct arena *arena, const struct chunk *chunk)
{
	if (chunk->flags & CHUNK_PUNCHED)
		return &arena->trimmed;
	return &arena->occupancy[chunk_occupancy(arena, chunk)];
}

static void chunk_list(struct arena *arena, uint32_t c)
{
	struct chunk *chunks = arena->region->chunks;
	uint32_t *head = chunk_list_head(arena, &chunks[c]);

	chunks[c].prev = CHUNK_NONE;
	chunks[c].next = *head;
	if (*head != CHUNK_NONE)
		chunks[*head].prev = c;
	*head = c;
}

/* As with free blocks, a link is followed only where the other end links back. */
static void chunk_unlist(struct arena *arena, uint32_t c)
{
	struct chunk *chunks = arena->region->chunks;
	uint32_t nr = region_nr_touched(arena->region);
	uint32_t next = chunks[c].next;
	uint32_t prev = chunks[c].prev;
	uint32_t *head = chunk_list_head(arena, &chunks[c]);

	if (next >= nr || chunks[next].prev != c)
		next = CHUNK_NONE;
	if (prev >= nr || chunks[prev].next != c)
		prev = CHUNK_NONE;
	if (next != CHUNK_NONE)
		chunks[next].prev = prev;
	if (prev != CHUNK_NONE)
		chunks[prev].next = next;
	else if (*head == c)
		*head = next;
}

/* Is the first chunk of a list what it ought to be? A list that begins with damage is given up. */
static bool chunk_heads(struct arena *arena, uint32_t *head, uint32_t flags)
{
	const struct chunk *chunk;

	if (*head == CHUNK_NONE)
		return false;
	chunk = &arena->region->chunks[*head];
	if (chunk->state == CHUNK_USED && chunk->flags == flags && chunk->prev == CHUNK_NONE &&
	    chunk_list_head(arena, chunk) == head)
		return true;
	*head = CHUNK_NONE;
	arena->nr_damaged++;
	return false;
}

/* Count a block in (@words > 0) or out of its chunk, and keep the chunk in the right list. */
static void chunk_account(struct arena *arena, uint32_t c, int words)
{
	struct chunk *chunk = &arena->region->chunks[c];
	uint32_t before = chunk_occupancy(arena, chunk);
	uint16_t live = (uint16_t)(chunk->live_words + words);
	bool moves = !chunk->flags &&
		     before != chunk_occupancy(arena, &(struct chunk){.live_words = live});

	if (moves)
		chunk_unlist(arena, c);
	chunk->live_words = live;
	chunk->nr_blocks = (uint16_t)(chunk->nr_blocks + (words > 0 ? 1 : -1));
	arena->live_words = (uint64_t)((int64_t)arena->live_words + words);
	if (moves)
		chunk_list(arena, c);
}

/* Make a chunk from the region one free block, listed. */
static void chunk_open(struct arena *arena, uint32_t c)
{
	struct chunk *chunk = &arena->region->chunks[c];
	struct block *block = block_at(arena, chunk_start(arena, c));

	chunk->live_words = chunk->nr_blocks = 0;
	chunk->flags = 0;
	chunk->punched = 0;
	arena->nr_chunks++;
	block_set(block, arena->region->chunk_words, true);
	block->prev = 0;
	class_insert(arena, chunk_start(arena, c));
	chunk_list(arena, c);
}

/* The chunk is one free block, in no class. */
static void chunk_close(struct arena *arena, uint32_t c)
{
	struct chunk *chunk = &arena->region->chunks[c];

	if (!(chunk->flags & CHUNK_ISOLATED))
		chunk_unlist(arena, c);
	memset(block_at(arena, chunk_start(arena, c)), 0, sizeof(struct block));
	arena->nr_chunks--;
	arena->punched_pages -= chunk->punched;
	if (chunk->flags & CHUNK_PUNCHED)
		region_give_punched(arena->region, c);
	else
		region_give_chunk(arena->region, c);
}

int arena_init(struct arena *arena, struct region *region)
{
	memset(arena, 0, sizeof(*arena));
	arena->region = region;
	arena->has_whole = region->chunk_bytes < PAGE_BYTES + BLOCK_HEADER_BYTES;
	arena->trimmed = CHUNK_NONE;
	memset(arena->occupancy, 0xff, sizeof(arena->occupancy));
	return -pthread_mutex_init(&arena->lock, NULL);
}

void arena_fini(struct arena *arena)
{
	pthread_mutex_destroy(&arena->lock);
}

/* About 10 us; a walk over a chunk, the longest hold, takes 5. */
#define LOCK_SPINS 300
#define YIELDS (LOCK_SPINS + 16)

static void lock_spinning(struct arena *arena)
{
	for (int i = 0; i < LOCK_SPINS; i++) {
		if (!pthread_mutex_trylock(&arena->lock))
			return;
		slot_relax();
	}
	pthread_mutex_lock(&arena->lock);
}

void arena_lock(struct arena *arena)
{
	if (!pthread_mutex_trylock(&arena->lock))
		return;
	atomic_fetch_add_explicit(&arena->waiting, 1, memory_order_relaxed);
	lock_spinning(arena);
	atomic_fetch_sub_explicit(&arena->waiting, 1, memory_order_relaxed);
}

void arena_yield_lock(struct arena *arena)
{
	/* With one CPU, whoever waits may be waiting for this thread to leave it. Somebody may wait
	 * for the slot that is being moved, so this comes to its turn, however many want theirs. */
	for (int i = 0; i < YIELDS && atomic_load_explicit(&arena->waiting, memory_order_relaxed);
	     i++)
		if (i < LOCK_SPINS)
			slot_relax();
		else
			sched_yield();
	lock_spinning(arena);
}

void arena_unlock(struct arena *arena)
{
	pthread_mutex_unlock(&arena->lock);
}

static int alloc_whole(struct arena *arena, uint32_t owner, bool compacting, uint64_t *place)
{
	uint32_t c;
	int rv = region_take_chunk(arena->region, compacting, &c);

	if (rv)
		return rv;
	arena->region->chunks[c].state = CHUNK_WHOLE;
	arena->region->chunks[c].flags = 0;
	arena->nr_chunks++;
	arena->nr_whole++;
	*place = chunk_start(arena, c);
	arena_tag(arena, *place)->owner = owner;
	return 0;
}

/* Cut @words off a free block that is in no class; what is left is listed. */
static void block_allocate(struct arena *arena, uint64_t place, uint32_t words, uint32_t owner)
{
	struct block *block = block_at(arena, place);
	struct block *next = block_next(arena, place);
	uint32_t rest = block_words(block) - words;

	if (rest >= BLOCK_MIN_WORDS) {
		struct block *tail = block_at(arena, place + words);

		block_set(tail, rest, true);
		tail->prev = (uint16_t)words;
		if (next)
			next->prev = (uint16_t)rest;
		class_insert(arena, place + words);
	} else {
		words += rest;
	}
	block_set(block, words, false);
	memset(&block->link, 0, sizeof(block->link));
	block->tag.owner = owner;
	chunk_account(arena, arena_chunk_of(arena, place), (int)words);
}

/* Is there a free block whose size its neighbour confirms? */
static bool is_free_block(const struct arena *arena, uint64_t place)
{
	const struct block *block = block_at(arena, place);
	uint32_t words = block_words(block);
	const struct block *next;

	if (!ref_is_valid(arena, place + 1) || !block_is_free(block) || words < BLOCK_MIN_WORDS ||
	    chunk_offset(arena, place) + words > arena->region->chunk_words)
		return false;
	next = block_next(arena, place);
	return !next || next->prev == words;
}

/* The best class for @words and its first block's @place. A list that begins with damage is
 * given up. */
static uint32_t find_block(struct arena *arena, uint32_t words, uint64_t *place)
{
	uint32_t class;

	while ((class = class_find(arena, words)) != CLASS_NONE) {
		*place = arena->classes[class] - 1;
		if (is_free_block(arena, *place) &&
		    block_class(block_words(block_at(arena, *place))) == class)
			break;
		arena->nr_damaged++;
		class_set_head(arena, class, 0);
	}
	return class;
}

int arena_alloc(struct arena *arena, uint32_t bytes, uint32_t owner, bool compacting,
		uint64_t *place)
{
	uint32_t words = arena_words(bytes);

	if (words > arena->region->chunk_words)
		return alloc_whole(arena, owner, compacting, place);
	if (find_block(arena, words, place) == CLASS_NONE) {
		uint32_t c;
		int rv = region_take_chunk(arena->region, compacting, &c);

		if (rv)
			return rv;
		chunk_open(arena, c);
		*place = chunk_start(arena, c);
	}
	class_remove(arena, *place);
	block_allocate(arena, *place, words, owner);
	return 0;
}

/* Do the tags of an allocated block agree with its neighbours'? */
static bool block_fits(const struct arena *arena, uint64_t place)
{
	const struct block *block = block_at(arena, place);
	uint32_t offset = chunk_offset(arena, place);
	uint32_t words = block_words(block);
	const struct block *next;

	if (block_is_free(block) || words < BLOCK_MIN_WORDS ||
	    offset + words > arena->region->chunk_words || block->prev > offset ||
	    (block->prev == 0) != (offset == 0) || chunk_of(arena, place)->live_words < words)
		return false;
	next = block_next(arena, place);
	if (next &&
	    (next->prev != words || (block_is_free(next) && !is_free_block(arena, place + words))))
		return false;
	return !block->prev || block_words(block_at(arena, place - block->prev)) == block->prev;
}

/* Let a free block that is in no class swallow the one behind it. */
static void block_absorb(struct arena *arena, uint64_t place)
{
	struct block *block = block_at(arena, place);
	struct block *next = block_next(arena, place);

	block_set(block, block_words(block) + block_words(next), true);
	memset(next, 0, sizeof(*next));
	next = block_next(arena, place);
	if (next)
		next->prev = (uint16_t)block_words(block);
}

int arena_free(struct arena *arena, uint64_t place)
{
	uint32_t c = arena_chunk_of(arena, place);
	struct chunk *chunk = &arena->region->chunks[c];
	struct block *block = block_at(arena, place);
	struct block *next;

	if (chunk->state == CHUNK_WHOLE) {
		arena->freed_words += arena->region->chunk_words;
		arena->nr_chunks--;
		arena->nr_whole--;
		region_give_chunk(arena->region, c);
		return 0;
	}
	if (chunk->state != CHUNK_USED || !block_fits(arena, place)) {
		arena->nr_damaged++;
		return -EUCLEAN;
	}
	arena->freed_words += block_words(block);
	chunk_account(arena, c, -(int)block_words(block));
	block_set(block, block_words(block), true);
	memset(&block->link, 0, sizeof(block->link));
	next = block_next(arena, place);
	if (next && block_is_free(next)) {
		if (!chunk->flags)
			class_remove(arena, place + block_words(block));
		block_absorb(arena, place);
	}
	if (block->prev && block_is_free(block_at(arena, place - block->prev))) {
		place -= block->prev;
		if (!chunk->flags)
			class_remove(arena, place);
		block_absorb(arena, place);
	}
	if (chunk->nr_blocks == 0 &&
	    block_words(block_at(arena, place)) == arena->region->chunk_words)
		chunk_close(arena, c);
	else if (!chunk->flags)
		class_insert(arena, place);
	return 0;
}

bool arena_holds(const struct arena *arena, uint64_t place, uint32_t bytes)
{
	const struct region *region = arena->region;
	uint32_t words = arena_words(bytes);

	if (place >> region->chunk_shift >= region_nr_touched(region))
		return false;
	if (words > region->chunk_words)
		return chunk_offset(arena, place) == 0;
	return chunk_offset(arena, place) + words <= region->chunk_words &&
	       block_at(arena, place)->size >= words &&
	       block_at(arena, place)->size < words + BLOCK_MIN_WORDS;
}

struct block_tag *arena_tag(const struct arena *arena, uint64_t place)
{
	if (arena->has_whole && chunk_of(arena, place)->state == CHUNK_WHOLE)
		return (struct block_tag *)&chunk_of(arena, place)->next;
	return &block_at(arena, place)->tag;
}

void *arena_payload(const struct arena *arena, uint64_t place)
{
	char *bytes = (char *)block_at(arena, place);

	if (arena->has_whole && chunk_of(arena, place)->state == CHUNK_WHOLE)
		return bytes;
	return bytes + BLOCK_HEADER_BYTES;
}

void arena_wipe(struct arena *arena, uint64_t place, uint32_t bytes)
{
	memset(arena_payload(arena, place), 0, bytes);
}

int arena_walk(const struct arena *arena, uint32_t chunk, struct arena_block *out)
{
	uint64_t end = chunk_start(arena, chunk) + arena->region->chunk_words;
	const struct block *block = block_at(arena, out->place);

	if (out->place >= end)
		return 0;
	out->words = block_words(block);
	out->is_free = block_is_free(block);
	out->owner = out->is_free ? 0 : block->tag.owner;
	if (out->words < BLOCK_MIN_WORDS || out->place + out->words > end)
		return -EUCLEAN;
	return 1;
}

static int chunk_tiles(const struct arena *arena, uint32_t c)
{
	struct arena_block block = {.place = chunk_start(arena, c)};
	uint32_t prev = 0;
	int rv;

	while ((rv = arena_walk(arena, c, &block)) > 0) {
		if (block_at(arena, block.place)->prev != prev)
			return -EUCLEAN;
		prev = block.words;
		block.place += block.words;
	}
	return rv;
}

static void chunk_for_each_free(struct arena *arena, uint32_t c,
				void (*each)(struct arena *arena, uint64_t place))
{
	struct arena_block block = {.place = chunk_start(arena, c)};

	while (arena_walk(arena, c, &block) > 0) {
		if (block.is_free)
			each(arena, block.place);
		block.place += block.words;
	}
}

uint32_t arena_sparsest(struct arena *arena)
{
	if (chunk_heads(arena, &arena->trimmed, CHUNK_PUNCHED))
		return arena->trimmed;
	for (uint32_t n = 0; n < ARENA_NR_OCCUPANCY; n++)
		if (chunk_heads(arena, &arena->occupancy[n], 0))
			return arena->occupancy[n];
	return CHUNK_NONE;
}

int arena_isolate(struct arena *arena, uint32_t c)
{
	int rv = chunk_tiles(arena, c);

	if (!rv && !arena->region->chunks[c].flags)
		chunk_for_each_free(arena, c, class_remove);
	chunk_unlist(arena, c);
	arena->region->chunks[c].flags |= CHUNK_ISOLATED;
	return rv;
}

void arena_unisolate(struct arena *arena, uint32_t c)
{
	arena->region->chunks[c].flags &= (uint8_t)~CHUNK_ISOLATED;
	if (!arena->region->chunks[c].flags)
		chunk_for_each_free(arena, c, class_insert);
	chunk_list(arena, c);
}

void arena_mark_punched(struct arena *arena, uint32_t c, uint32_t pages)
{
	struct chunk *chunk = &arena->region->chunks[c];

	chunk->flags |= CHUNK_PUNCHED;
	chunk->punched = (uint16_t)(chunk->punched + pages);
	arena->punched_pages += pages;
}

/* One more block of a chunk under reconstruction, at @place; returns the place behind it. */
static uint64_t rebuild_block(struct arena *arena, uint64_t place, uint32_t words, bool is_free,
			      uint32_t *prev)
{
	struct block *block = block_at(arena, place);

	if (is_free)
		memset(block, 0, (size_t)words * 4);
	block_set(block, words, is_free);
	block->prev = (uint16_t)*prev;
	*prev = words;
	if (is_free)
		class_insert(arena, place);
	return place + words;
}

void arena_rebuild_chunk(struct arena *arena, uint32_t c, const struct arena_claim *claims,
			 uint32_t nr)
{
	struct chunk *chunk = &arena->region->chunks[c];
	uint64_t at = chunk_start(arena, c);
	uint64_t end = at + arena->region->chunk_words;
	uint32_t prev = 0;

	*chunk = (struct chunk){.state = CHUNK_USED, .nr_blocks = (uint16_t)nr};
	arena->nr_chunks++;
	for (uint32_t i = 0; i < nr; i++) {
		uint64_t next = i + 1 < nr ? claims[i + 1].place : end;
		uint32_t words = arena_words(claims[i].bytes);
		uint32_t gap = (uint32_t)(next - claims[i].place) - words;

		if (claims[i].place > at && i == 0)
			at = rebuild_block(arena, at, (uint32_t)(claims[i].place - at), true,
					   &prev);
		if (gap < BLOCK_MIN_WORDS) {
			memset(block_at(arena, at + words), 0, gap * 4ULL);
			words += gap;
		}
		at = rebuild_block(arena, at, words, false, &prev);
		if (gap >= BLOCK_MIN_WORDS)
			at = rebuild_block(arena, at, gap, true, &prev);
		chunk->live_words = (uint16_t)(chunk->live_words + words);
	}
	arena->live_words += chunk->live_words;
	chunk_list(arena, c);
}
