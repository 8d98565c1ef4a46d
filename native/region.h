/* SPDX-License-Identifier: MIT
 *
 * region - the shared memory that outlives a worker
 *
 *   0          header: geometry, twice, counters, and the switch's journal
 *   map_off    one bit for each page of the slot table that was ever touched; twice, because a
 *              bit that is lost would lose 512 pages without a word
 *   slot_off   slot table: a 64-bit slot for each page of the file
 *   word_off   word table: the repeated word of same-filled pages whose slot cannot hold it, two
 *              places for each page
 *   chunk_off  chunk table: a struct chunk for each chunk
 *   arena_off  chunks
 *
 * Everything is found by offset from the start; nothing in a region is a pointer. Untouched
 * parts are holes in the file and read as zeroes: 'never used' is zero everywhere.
 *
 * Nothing that can be damaged there may lead astray: of the geometry struct region has its own
 * copy, and links and states in the chunk table are compared with what they ought to be. A list
 * that is damaged ends early; what was behind it is out of use until store_rebuild().
 *
 * A chunk is HOLE (no memory), READY (populated, all zero, the reserve), or USED (the arena's).
 * One keeper thread for each region populates READY chunks ahead of need and punches those above
 * the reserve, so that nobody else asks the OS for memory, or waits for it to take some.
 *
 * Locks: region->keeping (the keeper's work on the file, and whoever measures it; before slot
 * locks and arena->lock), region->lock (lists and counts; innermost of all, a few instructions).
 */
#ifndef REGION_H
#define REGION_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "journal.h"
#include "prelude.h"
#include "slot.h"

#define REGION_NR_COUNTERS 16
#define CHUNK_NONE UINT32_MAX
#define REGION_NR_FRESH 4

/* One set for each thread inside the store, so that no two write to one cache line. */
struct counters {
	_Atomic uint64_t reads, writes, failed_reads, failed_writes;
	_Atomic uint64_t notify_free, discards;
	/* Sums over all sets are what is there now; one set alone may wrap below zero. */
	_Atomic uint64_t same_pages, pages_stored, good_pages, raw_pages, compr_bytes;
} __attribute__((aligned(128)));

/* Written once. Magic and format stay where they are in all formats. */
struct region_geometry {
	char magic[8];
	uint32_t format;
	uint32_t chunk_bytes;
	uint64_t nr_pages, mem_limit, reserve_bytes;
	uint64_t nr_chunks;
	uint64_t map_off, slot_off, word_off, chunk_off, arena_off, total_bytes;
	uint64_t sum; /* over all of the above */
};

struct region_header {
	struct region_geometry geometry, geometry_copy;
	_Atomic uint64_t invalid_io, pages_compacted, pages_returned, max_used_bytes;
	struct counters counters[REGION_NR_COUNTERS];
	struct journal journal;
};

enum chunk_state {
	CHUNK_HOLE = 0,
	CHUNK_READY,
	CHUNK_USED,  /* holds blocks */
	CHUNK_WHOLE, /* is one block, its tag in next and prev; only where chunks are pages */
	CHUNK_STALE, /* zero where it is populated; on its way to HOLE */
	CHUNK_KEPT,  /* in the keeper's hands, and in no list */
};

struct chunk {
	uint32_t next, prev;   /* HOLE, READY, STALE: next in the list; USED: the arena's lists */
	uint16_t live_words;   /* USED: words in allocated blocks, headers included */
	uint16_t nr_blocks;    /* USED: allocated blocks */
	_Atomic uint8_t state; /* changed under region->lock, looked at under arena->lock, too */
	uint8_t flags;	       /* USED: CHUNK_ISOLATED, CHUNK_PUNCHED */
	uint16_t punched;      /* USED: OS pages that went back from within free blocks */
};

/* A USED chunk is in one of the arena's lists unless it is ISOLATED; its free blocks are in free
 * lists only where neither flag is set. */
#define CHUNK_ISOLATED 1 /* compaction is emptying it */
#define CHUNK_PUNCHED 2	 /* not populated throughout */

struct region {
	struct region_geometry geometry; /* not the one that can be damaged */
	struct region_header *header;
	_Atomic uint64_t *map, *map_copy;
	slot_t *slots;
	_Atomic uint64_t *words;
	struct chunk *chunks;
	uint32_t *arena;
	uint32_t nr_chunks;
	uint32_t chunk_bytes, chunk_words;
	uint32_t place_bits;	     /* that a place in this arena may have */
	uint32_t chunk_shift;	     /* place >> chunk_shift is the chunk's number */
	_Atomic uint32_t nr_touched; /* chunks from here on were never used */
	uint32_t nr_entries;	     /* of the chunk table, populated ahead; under keeping */
	int fd;

	pthread_mutex_t keeping;
	pthread_mutex_t lock;
	pthread_cond_t work;   /* the keeper waits here */
	pthread_cond_t change; /* whoever needs a chunk waits here */
	uint32_t ready, holes; /* heads of lists */
	uint32_t stale;	       /* likewise: free, but not populated throughout */
	/* Read without the lock where a hint is enough. */
	_Atomic uint32_t nr_ready;
	uint32_t nr_used;
	/* For the round of compaction under way: what the limit holds back for it, and how many it
	 * took, less those that it has emptied. */
	uint32_t nr_promised;
	int32_t nr_lent;
	uint32_t reserve;      /* READY chunks to hold */
	uint32_t max_used;     /* cap on USED chunks */
	uint32_t spare;	       /* of these, the last ones only for compaction */
	uint64_t nr_tries;     /* to populate chunks, begun so far */
	uint64_t failed_try;   /* the last of these that failed, counted from 1 */
	uint64_t wanted_try;   /* somebody waits for this one's end */
	uint64_t nr_published; /* tries that gave READY chunks */
	bool stuck;	       /* a waiter lost patience, and no try gave any since */
	uint32_t held;	/* while compaction runs: READY chunks above the reserve that may stay */
	uint64_t fresh; /* page of the slot table touched last for the first time, plus 1 */
	uint64_t fresh_before[REGION_NR_FRESH]; /* the keeper's: those that it saw before */
	uint32_t nr_fresh;
	uint64_t *ahead;    /* a bit for each such page that the keeper populated; under lock */
	uint32_t nr_unused; /* of these, not touched yet */
	_Atomic bool words_used; /* a word was put into the word table */
	bool stop;
	pthread_t keeper;
};

/**
 * region_map - map the region in @fd; the keeper is not yet started, no chunk is READY
 *
 * A damaged header is mended from its copy.
 *
 * Return: 0, -EINVAL (not a region), -EPROTONOSUPPORT (another format), -ENOMEM.
 */
int region_map(struct region **out, int fd);

/** region_start_keeper - Return: 0, -EAGAIN. */
int region_start_keeper(struct region *region);

/** region_destroy - stop the keeper, unmap. */
void region_destroy(struct region *region);

/**
 * region_mend - put right what is in the region twice, or known here
 *
 * The header's geometry is written again; of the two maps of touched slots, where one lost a bit,
 * or a process died between the two, the other has it.
 */
void region_mend(struct region *region);

/**
 * region_check - do header, maps and lists of chunks hold what they promise?
 *
 * Context: region->keeping held.
 * Return: 0, -EUCLEAN (@message says what is wrong).
 */
int region_check(struct region *region, char *message);

/**
 * region_reset_chunks - make lists and counts of chunks again
 * @nr_chunks: chunks from here on are not in use, whatever the chunk table says
 *
 * For rebuild: chunks below @nr_chunks that are USED or WHOLE stay. Of those that the chunk table
 * calls READY, and that are populated, the reserve is kept, zeroed: a crash may come when the OS
 * has no memory to fill it again. All others lose their memory.
 *
 * Context: region->keeping held; nobody else inside.
 */
void region_reset_chunks(struct region *region, uint32_t nr_chunks);

/**
 * region_take_chunk - get a populated, zeroed chunk
 * @compacting: may dip into the spare that the memory limit holds back for compaction, but not
 *              into the reserve's last eighth, which is for writers
 *
 * Context: below the arena lock. Does not wait.
 * Return: 0, -EAGAIN (none READY: region_wait_ready() and try again), -ENOSPC (memory limit).
 */
int region_take_chunk(struct region *region, bool compacting, uint32_t *chunk);

/* How long a call waits for the keeper, in all its waits; all zero before the first. */
struct region_patience {
	struct timespec until;
	uint64_t nr_published; /* before */
};

/**
 * region_wait_ready - wait for the keeper, up to a second
 *
 * The OS may be busy for long, and reclaim, which the OS is busy with, may wait for the caller:
 * after a second the page had better stay with the kernel. From then on nobody waits at all until
 * the keeper has got memory again: a queue of requests does not take a second each.
 *
 * Return: 0, -ENOSPC (a try that began after the call failed, or it takes too long).
 */
int region_wait_ready(struct region *region, bool compacting, struct region_patience *patience);

/** region_has_ready - is a chunk READY? Takes no lock, so it may be gone, or have come. */
static inline bool region_has_ready(const struct region *region)
{
	return atomic_load_explicit(&region->nr_ready, memory_order_relaxed);
}

/** region_give_chunk - return a chunk; its memory must be zero. Context: below the arena lock. */
void region_give_chunk(struct region *region, uint32_t chunk);

/** region_give_punched - likewise, for a chunk that lost some of its OS pages already. */
void region_give_punched(struct region *region, uint32_t chunk);

/** region_settle - give all that is above the reserve back to the OS, in the caller's thread. */
void region_settle(struct region *region);

/** region_replenish - fill the reserve now, in the caller's thread, as far as the OS allows. */
void region_replenish(struct region *region);

/**
 * region_hold - let compaction have up to @chunks READY chunks above the reserve, and three
 * quarters of the reserve; 0: as ever
 *
 * Meanwhile nothing is returned but by region_settle(): the chunks that compaction empties are
 * those that it fills next, and a keeper that works beside it would take a CPU from the lanes.
 */
void region_hold(struct region *region, uint32_t chunks);

/**
 * region_compaction_budget - READY chunks for a round of compaction, which begins
 *
 * No more than can be taken before the keeper would refill, and than leaves writers half of what
 * the memory limit lets them have. Writers will leave it as many.
 */
uint32_t region_compaction_budget(struct region *region);

/** region_end_round - hold back nothing for a round any more: it has all that it takes. */
void region_end_round(struct region *region);

/**
 * region_punch - give OS pages of the arena back
 * @offset: bytes from the arena's start
 *
 * Return: 0, -errno.
 */
int region_punch(struct region *region, uint64_t offset, uint64_t bytes);

/** region_drop - likewise, not counted as returned. */
int region_drop(struct region *region, uint64_t offset, uint64_t bytes);

/* For region*.c: */

/** region_reserve_target - READY chunks to hold now: the memory limit covers the reserve, too. */
uint32_t region_reserve_target(const struct region *region);

static inline void region_list_push(struct region *region, uint32_t *head, uint32_t c,
				    enum chunk_state state)
{
	region->chunks[c].state = (uint8_t)state;
	region->chunks[c].next = *head;
	*head = c;
}

/* Chunks that may be in use. */
static inline uint32_t region_nr_touched(const struct region *region)
{
	return atomic_load_explicit(&region->nr_touched, memory_order_relaxed);
}

/** region_usage - what the OS says: resident bytes of arena, tables and reserve. */
void region_usage(struct region *region, uint64_t *arena, uint64_t *tables, uint64_t *reserve);

/**
 * region_populate - get memory for a part of the region, and map it
 * @offset: bytes from the region's start
 *
 * Return: 0, -errno (the OS has none).
 */
int region_populate(struct region *region, uint64_t offset, uint64_t bytes);

/**
 * region_note_fresh - have table pages populated that are likely to be touched after @page
 *
 * Context: any thread; takes region->lock, does not wait.
 */
void region_note_fresh(struct region *region, uint64_t page);

/** region_populate_tables - do so. Context: the keeper, both locks; drops region->lock meanwhile. */
void region_populate_tables(struct region *region);

/**
 * region_populate_entries - populate the entries of the next @more chunks to be touched
 *
 * Context: region->keeping held, region->lock not.
 */
void region_populate_entries(struct region *region, uint32_t more);

/* Pages of the slot table hold 512 entries each; an untouched one must not even be read, because
 * reading a hole through a mapping allocates it. */
#define TABLE_SLOTS (PAGE_BYTES / sizeof(slot_t))

static inline bool region_touched(const struct region *region, uint64_t index)
{
	uint64_t page = index / TABLE_SLOTS;
	uint64_t bits = atomic_load_explicit(&region->map[page / 64], memory_order_acquire) |
			atomic_load_explicit(&region->map_copy[page / 64], memory_order_acquire);

	return bits >> page % 64 & 1;
}

static inline void region_touch(struct region *region, uint64_t index)
{
	uint64_t page = index / TABLE_SLOTS;
	uint64_t bit = 1ULL << page % 64;
	uint64_t before;

	if (region_touched(region, index))
		return;
	before = atomic_fetch_or_explicit(&region->map[page / 64], bit, memory_order_acq_rel);
	atomic_fetch_or_explicit(&region->map_copy[page / 64], bit, memory_order_acq_rel);
	if (!(before & bit))
		region_note_fresh(region, page);
}

#endif
