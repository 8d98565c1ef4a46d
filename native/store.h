/* SPDX-License-Identifier: MIT
 *
 * store - slot table, codec and arena joined; the insides, for store*.c, compact.c and tests
 *
 * A write stages (compresses), locks the slots, allocates, copies, swings the slots to the new
 * blocks, and only then frees the old ones. Whatever ends it in between, each slot names either
 * the old block or the new one, and a block that no slot names is freed by store_rebuild().
 *
 * A block belongs to the holder of its owner's slot lock: readers decode in place under it,
 * compaction moves under it, and arena->lock guards only headers, lists and counts.
 *
 * Lock order: store->compacting, slot locks (several in rising order of index), arena->lock, region->lock.
 */
#ifndef STORE_H
#define STORE_H

#include "arena.h"
#include "codec.h"

#define STORE_BATCH 32 /* pages written under one arena lock; reclaim sends about as many */

/* A page on its way into the store. */
struct staged {
	enum slot_state state;
	uint32_t length;
	const void *payload;
	uint64_t value; /* the repeated word of a same-filled page */
	uint64_t place;
	uint64_t word; /* the slot's new word */
};

/* One thread's desk inside the store; taken for the length of a call. */
struct scratch {
	_Atomic uint32_t busy;
	struct counters *counters;
	struct region_patience patience; /* of the call under way */
	struct staged staged[STORE_BATCH];
	uint64_t old[STORE_BATCH]; /* the slots' words before */
	uint64_t codec_state[CODEC_STATE_BYTES / 8];
	uint8_t compressed[STORE_BATCH][CODEC_MAX_BYTES];
	uint8_t page[PAGE_BYTES];
} __attribute__((aligned(PAGE_BYTES)));

struct compaction;

struct store {
	struct region *region;
	struct arena arena;
	uint64_t nr_pages;
	struct scratch *scratch;    /* REGION_NR_COUNTERS of them */
	pthread_mutex_t compacting; /* outermost of all locks */
	struct compaction *compaction;
	/* Under arena.lock: see store_watch(). */
	int watch_fd;	      /* -1: nobody watches */
	uint64_t watch_words; /* tell when arena.freed_words gets here */
};

/** compaction_create - the desk of compact.c. Return: it, or NULL (no memory). */
struct compaction *compaction_create(void);
void compaction_destroy(struct compaction *compaction);

static inline void counter_add(_Atomic uint64_t *counter, uint64_t n)
{
	uint64_t now = atomic_load_explicit(counter, memory_order_relaxed);

	atomic_store_explicit(counter, now + n, memory_order_relaxed);
}

/* Where a slot's block is. */
static inline uint64_t store_place(const struct store *store, uint64_t word)
{
	return slot_place(word) & ((1ULL << store->region->place_bits) - 1);
}

/* What the place of a block with @checksum has in the bits above it. */
static inline uint64_t store_tie(const struct store *store, uint32_t checksum)
{
	return (uint64_t)checksum << store->region->place_bits & ((1ULL << SLOT_PLACE_BITS) - 1);
}

/** store_journal - Return: the switch's part of the region. */
static inline struct journal *store_journal(struct store *store)
{
	return &store->region->header->journal;
}

/** store_has_ready - will a write that needs a chunk find one without waiting? Only a hint. */
static inline bool store_has_ready(const struct store *store)
{
	return region_has_ready(store->region);
}

/** store_enter - get a desk; waits when all are taken. */
struct scratch *store_enter(struct store *store);
void store_leave(struct scratch *scratch);

/** store_in_range - is [@index, @index+@nr-1] a part of the file? Counts when it is not. */
bool store_in_range(struct store *store, uint64_t index, uint64_t nr);

/**
 * store_seal_target - what a slot's check covers beside the slot itself
 *
 * Context: the slot's lock is held.
 * Return: 0, -EIO (the slot names what cannot be a block, or another owner's).
 */
int store_seal_target(const struct store *store, uint64_t index, uint64_t word, uint64_t *target);

/** store_unlock_arena - give up arena->lock, and tell the watcher when it is time. */
void store_unlock_arena(struct store *store);

/** store_load - decode the page behind a locked slot's word. Return: 0, -EIO. */
int store_load(struct store *store, uint64_t index, uint64_t word, void *page);

/** store_stage - compress @page into place @i of the desk. */
void store_stage(struct scratch *scratch, uint32_t i, const void *page);

/**
 * store_commit - store what is staged and give up the slots' locks
 * @nr: slots from @index; locked, their words in scratch->old
 *
 * Return: how many, from @index, were stored; the rest keep their content.
 */
uint32_t store_commit(struct store *store, struct scratch *scratch, uint64_t index, uint32_t nr);

/** store_count_page - add (@n 1) or remove (@n -1) a page from what the counters say is there. */
void store_count_page(struct counters *counters, uint64_t word, int n);

#endif
