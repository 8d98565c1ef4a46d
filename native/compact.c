/* SPDX-License-Identifier: MIT
 *
 * compact - pack the blocks of sparse chunks, give the emptied chunks back
 *
 * One round:
 *   choose   the sparsest chunks, until what lives in them fills the round's budget of fresh
 *            chunks; give up where emptying them would not win a chunk
 *   isolate  each: nothing is allocated from it any more
 *   move     their blocks, largest first, each to the free block that fits it best: a hole in a
 *            chunk that stays, what is left of a fresh chunk, or a fresh chunk
 *   release  comes by itself: the last block to leave a chunk gives it back
 *
 * Evacuating one chunk at a time stalls, because holes elsewhere are smaller than its blocks.
 * Moving many chunks' blocks at once, in falling order of size, packs them as best fit
 * decreasing packs bins: the small ones that come last fill the ends that the large ones left.
 *
 * A move takes the slot's lock (never waits for it: a busy page is skipped), takes the arena's
 * lock to free the block moved before and to allocate, copies, swings the slot, and unlocks. So a
 * page request waits for one block's copy, or for one allocation, whatever compaction does.
 *
 * Wherever it is interrupted, each slot names a whole block: the old one until the swing, the
 * new one from then on. The other is nobody's, and store_rebuild() frees it.
 */
#include "store.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "memory.h"

#define MAX_SOURCES 2048 /* chunks isolated in one round */
#define MAX_MOVES 32768	 /* blocks moved in one round; a chunk of 64 KiB has 4096 at the most */
#define MAX_FRESH 64	 /* chunks that one round may fill: the reserve's default */
#define MAX_RUNS (STORE_MAX_CHUNK_BYTES / PAGE_BYTES)
#define LOOKS 256 /* chunks looked at under one hold of the arena's lock */
#define LOCK_TRIES 64
#define PREFETCH_AHEAD 2

struct move {
	uint64_t place;
	uint32_t words;
	uint32_t owner;
};

struct run {
	uint64_t offset, bytes; /* from the arena's start */
};

/* The desk of the one thread that compacts. */
struct compaction {
	uint32_t nr_sources, nr_moves;
	uint32_t nr_taken;   /* fresh chunks */
	uint64_t live_words; /* in the sources */
	uint64_t budget;     /* of live words */
	uint32_t sparse;     /* live words of a chunk that is worth emptying; 0: the sparsest are */
	uint32_t cursor;     /* chunk looked at last */
	uint32_t to_look;    /* chunks to look at before a round has seen them all */
	uint64_t left;	     /* place of the block moved last, not yet freed, plus 1 */
	uint32_t nr_runs;
	struct run runs[MAX_RUNS];
	uint32_t sources[MAX_SOURCES];
	struct move moves[MAX_MOVES];
};

struct compaction *compaction_create(void)
{
	return memory_map(sizeof(struct compaction));
}

void compaction_destroy(struct compaction *c)
{
	munmap(c, sizeof(*c));
}

/* Isolate a chunk and note its blocks. Returns false where it does not fit the round. What the
 * chunk table says of it may be damaged: blocks for which there is no room stay. */
static bool add_source(struct store *store, struct compaction *c, uint32_t chunk)
{
	const struct chunk *entry = &store->region->chunks[chunk];
	struct arena_block b = {.place = (uint64_t)chunk << store->region->chunk_shift};

	if (c->nr_sources == MAX_SOURCES || c->nr_moves == MAX_MOVES ||
	    c->live_words + entry->live_words > c->budget ||
	    c->nr_moves + entry->nr_blocks > MAX_MOVES)
		return false;
	if (arena_isolate(&store->arena, chunk))
		return true; /* damaged: set aside */
	c->sources[c->nr_sources++] = chunk;
	c->live_words += entry->live_words;
	for (; c->nr_moves < MAX_MOVES && arena_walk(&store->arena, chunk, &b) > 0;
	     b.place += b.words)
		if (!b.is_free)
			c->moves[c->nr_moves++] = (struct move){b.place, b.words, b.owner};
	return true;
}

/*
 * One more chunk: the sparsest. But while there are chunks that are a quarter free, first those
 * like them in order of place, because neighbours go back to the OS in one call (12 us a chunk in
 * long runs, 19 alone). Where all are fuller only the very sparsest win anything.
 */
static bool choose_chunk(struct store *store, struct compaction *c)
{
	uint32_t sparsest = arena_sparsest(&store->arena);

	if (sparsest == CHUNK_NONE)
		return false;
	if (!c->sparse || !c->to_look || store->region->chunks[sparsest].flags)
		return add_source(store, c, sparsest);
	for (uint32_t looks = 0; looks < LOOKS && c->to_look; looks++, c->to_look--) {
		const struct chunk *entry;

		if (++c->cursor >= region_nr_touched(store->region))
			c->cursor = 0;
		entry = &store->region->chunks[c->cursor];
		if (entry->state == CHUNK_USED && !entry->flags && entry->live_words <= c->sparse)
			return add_source(store, c, c->cursor);
	}
	return true;
}

/* Chunks that the sources' blocks will need, if none of them finds a hole elsewhere. */
static uint64_t chunks_for(const struct store *store, uint64_t words)
{
	return (words + store->region->chunk_words - 1) / store->region->chunk_words;
}

/* Isolated chunks that still hold blocks go on as before. Returns how many do not. */
static uint32_t restore_sources(struct store *store, struct compaction *c)
{
	uint32_t emptied = 0;

	for (uint32_t i = 0; i < c->nr_sources; i++) {
		uint32_t chunk = c->sources[i];

		arena_yield_lock(&store->arena);
		if (store->region->chunks[chunk].state == CHUNK_USED &&
		    store->region->chunks[chunk].flags & CHUNK_ISOLATED)
			arena_unisolate(&store->arena, chunk);
		else
			emptied++;
		arena_unlock(&store->arena);
	}
	return emptied;
}

static void begin_round(struct store *store, struct compaction *c)
{
	uint32_t words = store->region->chunk_words;
	uint32_t fresh = region_compaction_budget(store->region);
	uint32_t sparsest;

	c->nr_sources = c->nr_moves = c->nr_taken = 0;
	c->live_words = c->left = 0;
	c->budget = (uint64_t)(fresh < MAX_FRESH ? fresh : MAX_FRESH) * words;
	arena_yield_lock(&store->arena);
	sparsest = arena_sparsest(&store->arena);
	c->sparse = sparsest == CHUNK_NONE ? words : store->region->chunks[sparsest].live_words;
	c->sparse = c->sparse < words * 3 / 4 ? c->sparse + (words - c->sparse) / 4 : 0;
	c->to_look = region_nr_touched(store->region);
	arena_unlock(&store->arena);
}

/* Returns whether the round is worth its moves. */
static bool choose(struct store *store, struct compaction *c)
{
	bool more = true;

	begin_round(store, c);
	while (more) {
		arena_yield_lock(&store->arena);
		more = choose_chunk(store, c);
		arena_unlock(&store->arena);
	}
	return c->nr_sources > chunks_for(store, c->live_words);
}

static int compare_moves(const void *a, const void *b)
{
	const struct move *x = a;
	const struct move *y = b;

	return (x->words < y->words) - (x->words > y->words);
}

/* Free what the last move left behind and allocate for the next, under one lock. */
static int next_place(struct store *store, struct compaction *c, uint64_t word, uint32_t owner,
		      uint64_t *place)
{
	uint64_t nr_chunks;
	int rv = 0;

	arena_yield_lock(&store->arena);
	if (c->left)
		arena_free(&store->arena, c->left - 1);
	c->left = 0;
	nr_chunks = store->arena.nr_chunks;
	if (place)
		rv = arena_alloc(&store->arena, slot_length(word), owner, true, place);
	c->nr_taken += (uint32_t)(store->arena.nr_chunks - nr_chunks);
	arena_unlock(&store->arena);
	return rv;
}

static bool lock_owner(slot_t *slot, uint64_t *word)
{
	for (int i = 0; i < LOCK_TRIES; i++) {
		if (slot_trylock(slot, word))
			return true;
		slot_relax();
	}
	return false;
}

/* Return: 1 moved, 0 not this one (freed meanwhile, busy, or damaged), -EAGAIN, -ENOSPC. */
static int move_block(struct store *store, struct compaction *c, const struct move *move)
{
	slot_t *slot = &store->region->slots[move->owner];
	uint64_t word, target, to;
	int rv = 0;

	if (move->owner >= store->nr_pages || !region_touched(store->region, move->owner) ||
	    !lock_owner(slot, &word))
		return 0;
	if (!slot_has_block(word) || store_place(store, word) != move->place ||
	    store_seal_target(store, move->owner, word, &target) || !slot_is_sealed(word, target))
		goto out;
	rv = next_place(store, c, word, move->owner, &to);
	if (rv)
		goto out;
	memcpy(arena_payload(&store->arena, to), arena_payload(&store->arena, move->place),
	       slot_length(word));
	arena_tag(&store->arena, to)->checksum = (uint32_t)target;
	slot_swing(slot, slot_make_block(slot_state(word), to | store_tie(store, (uint32_t)target),
					 slot_length(word), (uint32_t)target));
	arena_wipe(&store->arena, move->place, slot_length(word));
	c->left = move->place + 1;
	return 1;
out:
	slot_unlock(slot);
	return rv;
}

/* Sorted by size, the moves jump about in memory: a move's slot and block are fetched while those
 * before it are copied. Half the time of a move, measured. */
static void prefetch_move(const struct store *store, const struct move *move)
{
	const char *block = (const char *)(store->region->arena + move->place);

	__builtin_prefetch(&store->region->slots[move->owner], 1);
	for (uint32_t at = 0; at < move->words * 4; at += 64)
		__builtin_prefetch(block + at, 1);
}

static void move_all(struct store *store, struct compaction *c)
{
	struct region_patience patience = {0};
	uint64_t moved = 0;

	qsort(c->moves, c->nr_moves, sizeof(*c->moves), compare_moves);
	for (uint32_t i = 0; i < c->nr_moves; i++) {
		int rv;

		if (i + PREFETCH_AHEAD < c->nr_moves)
			prefetch_move(store, &c->moves[i + PREFETCH_AHEAD]);
		rv = move_block(store, c, &c->moves[i]);
		if (rv == -EAGAIN && !region_wait_ready(store->region, true, &patience))
			rv = move_block(store, c, &c->moves[i]);
		if (rv < 0)
			break;
		moved += (uint64_t)rv;
	}
	next_place(store, c, 0, 0, NULL);
	atomic_fetch_add(&store->region->header->pages_compacted, moved);
}

/* Return: chunks won. */
static int64_t compact_round(struct store *store, struct compaction *c)
{
	uint32_t emptied;

	if (choose(store, c))
		move_all(store, c);
	emptied = restore_sources(store, c);
	region_end_round(store->region);
	return (int64_t)emptied - c->nr_taken;
}

/* The whole OS pages between a free block's header and its end; words from the arena's start. */
static uint64_t whole_pages(const struct arena_block *b, uint64_t *first)
{
	const uint64_t page_words = PAGE_BYTES / 4;
	uint64_t end = (b->place + b->words) / page_words * page_words;

	*first = (b->place + BLOCK_MIN_WORDS + page_words - 1) / page_words * page_words;
	return *first < end ? (end - *first) / page_words : 0;
}

/* Note the runs of whole OS pages in the free blocks of an ISOLATED chunk. Returns their pages. */
static uint32_t find_runs(struct store *store, struct compaction *c, uint32_t chunk)
{
	struct arena_block b = {.place = (uint64_t)chunk << store->region->chunk_shift};
	uint32_t sum = 0;

	for (c->nr_runs = 0; arena_walk(&store->arena, chunk, &b) > 0; b.place += b.words) {
		uint64_t first;
		uint64_t pages = b.is_free ? whole_pages(&b, &first) : 0;

		if (!pages)
			continue;
		c->runs[c->nr_runs++] = (struct run){first * 4, pages * PAGE_BYTES};
		sum += (uint32_t)pages;
	}
	return sum;
}

/* Isolate the sparsest chunk if a quarter of it is whole free OS pages. */
static bool choose_trimmed(struct store *store, struct compaction *c, uint32_t *chunk)
{
	struct arena *arena = &store->arena;
	uint32_t pages;

	*chunk = arena_sparsest(arena);
	if (*chunk == CHUNK_NONE || store->region->chunks[*chunk].flags ||
	    arena_isolate(arena, *chunk))
		return false;
	pages = find_runs(store, c, *chunk);
	if ((uint64_t)pages * PAGE_BYTES * 4 >= store->region->chunk_bytes) {
		arena_mark_punched(arena, *chunk, pages);
		return true;
	}
	arena_unisolate(arena, *chunk);
	return false;
}

/*
 * What rounds cannot win is less than a chunk: the sparsest one that stays. Its whole free OS
 * pages go back, and it takes no more blocks until a round empties it. Free blocks of an ISOLATED
 * chunk only grow, and their headers stay, so the arena's lock is not needed meanwhile. Should
 * the chunk be emptied, the keeper could give it to somebody else: region->keeping holds it off.
 * The keeper waits for that, and others for the keeper, so here nobody is let go before.
 */
static uint64_t trim(struct store *store, struct compaction *c)
{
	uint64_t won = 0;
	uint32_t chunk;
	bool found;

	pthread_mutex_lock(&store->region->keeping);
	arena_lock(&store->arena);
	found = choose_trimmed(store, c, &chunk);
	arena_unlock(&store->arena);
	for (uint32_t i = 0; found && i < c->nr_runs; i++) {
		region_punch(store->region, c->runs[i].offset, c->runs[i].bytes);
		won += c->runs[i].bytes;
	}
	arena_lock(&store->arena);
	if (found && store->region->chunks[chunk].state == CHUNK_USED)
		arena_unisolate(&store->arena, chunk);
	arena_unlock(&store->arena);
	pthread_mutex_unlock(&store->region->keeping);
	return won;
}

/* All that can be won now: what no block takes of the chunks that hold blocks. */
static uint64_t bytes_to_win(struct store *store)
{
	const struct arena *arena = &store->arena;
	uint64_t words;

	arena_yield_lock(&store->arena);
	words = (arena->nr_chunks - arena->nr_whole) * store->region->chunk_words -
		arena->live_words;
	arena_unlock(&store->arena);
	return words * 4;
}

int64_t store_compact(struct store *store, uint64_t max_bytes)
{
	uint64_t won = 0;
	uint64_t most;
	int64_t chunks = 1;

	pthread_mutex_lock(&store->compacting);
	/* While others write and free, there is something to win after each round, for ever. */
	most = bytes_to_win(store);
	if (most > max_bytes)
		most = max_bytes;
	/* What a round can win depends on how many fresh chunks it may fill. */
	region_replenish(store->region);
	region_hold(store->region, MAX_FRESH);
	while (chunks > 0 && won < most) {
		chunks = compact_round(store, store->compaction);
		region_settle(store->region);
		if (chunks > 0)
			won += (uint64_t)chunks * store->region->chunk_bytes;
	}
	if (won < max_bytes)
		won += trim(store, store->compaction);
	region_hold(store->region, 0);
	region_settle(store->region);
	pthread_mutex_unlock(&store->compacting);
	return (int64_t)won;
}
