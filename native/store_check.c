/* SPDX-License-Identifier: MIT
 *
 * store_check - the slot table is the truth: compare everything with it, or recreate it from it
 */
#include "store.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MESSAGE_BYTES 160

#define FAULT(message, ...) (snprintf(message, MESSAGE_BYTES, __VA_ARGS__), -EUCLEAN)

/* What the gauges of all counter sets together ought to say; in a set of its own. */
struct tally {
	struct counters counters;
	uint64_t nr_blocks;
};

static uint64_t next_touched(const struct store *store, uint64_t index)
{
	while (index < store->nr_pages && !region_touched(store->region, index))
		index = (index / TABLE_SLOTS + 1) * TABLE_SLOTS;
	return index;
}

#define for_each_touched(store, index)                                                             \
	for (uint64_t index = next_touched(store, 0); index < (store)->nr_pages;                   \
	     index = next_touched(store, index + 1))

static void sum_gauges(const struct store *store, struct counters *sum)
{
	memset(sum, 0, sizeof(*sum));
	for (int i = 0; i < REGION_NR_COUNTERS; i++) {
		struct counters *c = &store->region->header->counters[i];

		counter_add(&sum->reads, atomic_load(&c->reads));
		counter_add(&sum->writes, atomic_load(&c->writes));
		counter_add(&sum->failed_reads, atomic_load(&c->failed_reads));
		counter_add(&sum->failed_writes, atomic_load(&c->failed_writes));
		counter_add(&sum->notify_free, atomic_load(&c->notify_free));
		counter_add(&sum->discards, atomic_load(&c->discards));
		counter_add(&sum->same_pages, atomic_load(&c->same_pages));
		counter_add(&sum->pages_stored, atomic_load(&c->pages_stored));
		counter_add(&sum->good_pages, atomic_load(&c->good_pages));
		counter_add(&sum->raw_pages, atomic_load(&c->raw_pages));
		counter_add(&sum->compr_bytes, atomic_load(&c->compr_bytes));
	}
}

int store_get_stats(struct store *store, struct store_stats *out)
{
	const struct region_header *h = store->region->header;
	struct counters sum;

	sum_gauges(store, &sum);
	*out = (struct store_stats){
		.nr_pages = h->nr_pages,
		.mem_limit = h->mem_limit,
		.reads = sum.reads,
		.writes = sum.writes,
		.failed_reads = sum.failed_reads,
		.failed_writes = sum.failed_writes,
		.invalid_io = h->invalid_io,
		.notify_free = sum.notify_free,
		.discards = sum.discards,
		.same_pages = sum.same_pages,
		.pages_stored = sum.pages_stored,
		.good_pages = sum.good_pages,
		.raw_pages = sum.raw_pages,
		.compr_bytes = sum.compr_bytes,
		.pages_compacted = h->pages_compacted,
		.pages_returned = h->pages_returned,
		.mem_max_bytes = h->max_used_bytes,
	};
	arena_lock(&store->arena);
	out->nr_chunks = store->arena.nr_chunks;
	out->free_bytes = arena_free_words(&store->arena) * 4;
	arena_unlock(&store->arena);
	region_usage(store->region, &out->mem_used_bytes, &out->table_bytes, &out->reserve_bytes);
	return 0;
}

static int check_slot(struct store *store, uint64_t index, struct tally *tally, char *message)
{
	uint64_t word = atomic_load(&store->region->slots[index]);
	uint8_t page[PAGE_BYTES];

	if (word & SLOT_LOCK)
		return FAULT(message, "slot %llu is locked", (unsigned long long)index);
	if (store_load(store, index, word, page))
		return FAULT(message, "page %llu is damaged", (unsigned long long)index);
	store_count_page(&tally->counters, word, 1);
	tally->nr_blocks += slot_has_block(word);
	return 0;
}

static bool slot_names(const struct store *store, uint32_t owner, uint64_t place)
{
	uint64_t word;

	if (owner >= store->nr_pages || !region_touched(store->region, owner))
		return false;
	word = atomic_load(&store->region->slots[owner]);
	return slot_has_block(word) && slot_place(word) == place;
}

/* Every allocated block is named by its owner's slot; slots name as many blocks as there are, so
 * that no block has two. */
static int check_owners(struct store *store, uint64_t nr_blocks, char *message)
{
	const struct region *region = store->region;
	uint32_t touched = atomic_load(&region->header->nr_chunks_touched);
	uint64_t nr = store->arena.nr_whole;

	for (uint32_t c = 0; c < touched; c++) {
		struct arena_block b = {.place = (uint64_t)c << region->chunk_shift};

		if (region->chunks[c].state != CHUNK_USED)
			continue;
		for (; arena_walk(&store->arena, c, &b) > 0; b.place += b.words) {
			if (b.is_free)
				continue;
			if (!slot_names(store, b.owner, b.place))
				return FAULT(message, "block %llu is not its owner's, slot %u",
					     (unsigned long long)b.place, b.owner);
			nr++;
		}
	}
	if (nr != nr_blocks)
		return FAULT(message, "%llu blocks, but slots name %llu", (unsigned long long)nr,
			     (unsigned long long)nr_blocks);
	return 0;
}

static int check_gauges(struct store *store, const struct counters *tally, char *message)
{
	struct counters sum;

	sum_gauges(store, &sum);
	if (sum.same_pages != tally->same_pages || sum.pages_stored != tally->pages_stored ||
	    sum.good_pages != tally->good_pages || sum.raw_pages != tally->raw_pages ||
	    sum.compr_bytes != tally->compr_bytes)
		return FAULT(message, "counters say %llu pages of %llu bytes, slots %llu of %llu",
			     (unsigned long long)sum.pages_stored,
			     (unsigned long long)sum.compr_bytes,
			     (unsigned long long)tally->pages_stored,
			     (unsigned long long)tally->compr_bytes);
	return 0;
}

static int check_map(const struct store *store, char *message)
{
	for (uint64_t at = 0; at < store->nr_pages; at += TABLE_SLOTS * 64) {
		uint64_t n = at / TABLE_SLOTS / 64;

		if (store->region->map[n] != store->region->map_copy[n])
			return FAULT(message, "the two maps of touched slots differ at page %llu",
				     (unsigned long long)at);
	}
	return 0;
}

int store_check(struct store *store, char *message)
{
	struct tally tally = {0};
	int rv = arena_check(&store->arena, message);

	if (!rv)
		rv = check_map(store, message);
	for_each_touched(store, index) {
		if (rv)
			break;
		rv = check_slot(store, index, &tally, message);
	}
	pthread_mutex_lock(&store->region->keeping);
	if (!rv)
		rv = check_owners(store, tally.nr_blocks, message);
	pthread_mutex_unlock(&store->region->keeping);
	if (!rv)
		rv = check_gauges(store, &tally.counters, message);
	return rv;
}

/* Can a slot's word be trusted to say where its block is? */
static bool claims_block(const struct store *store, uint64_t index, uint64_t word)
{
	const struct region *region = store->region;
	uint64_t place = slot_place(word);
	uint64_t c = place >> region->chunk_shift;
	uint32_t offset = (uint32_t)(place & (region->chunk_words - 1));
	uint32_t words = arena_words(slot_length(word));
	bool whole = words > region->chunk_words;
	uint64_t target;
	uint8_t state;

	if (!slot_has_block(word) || (offset && offset < BLOCK_MIN_WORDS) ||
	    (!whole && offset + words > region->chunk_words) ||
	    c >= atomic_load(&region->header->nr_chunks_touched))
		return false;
	/* Whether the tag is in the chunk table is the slot's to say. */
	state = region->chunks[c].state;
	region->chunks[c].state = whole ? CHUNK_WHOLE : CHUNK_USED;
	if (!store_seal_target(store, index, word, &target) && slot_is_sealed(word, target))
		return true;
	region->chunks[c].state = state;
	return false;
}

/* Unlock every slot; count the trustworthy claims on each chunk in @ends[chunk]. */
static uint64_t count_claims(struct store *store, uint32_t *ends)
{
	uint64_t nr = 0;

	for_each_touched(store, index) {
		uint64_t word = atomic_load(&store->region->slots[index]);

		if (word & SLOT_LOCK)
			slot_unlock(&store->region->slots[index]);
		if (claims_block(store, index, word)) {
			ends[slot_place(word) >> store->region->chunk_shift]++;
			nr++;
		}
	}
	return nr;
}

/* Sort the claims by chunk; @ends becomes where each chunk's claims end. */
static void collect_claims(struct store *store, struct arena_claim *claims, uint32_t *ends,
			   uint32_t nr_chunks)
{
	uint32_t at = 0;

	for (uint32_t c = 0; c < nr_chunks; c++) {
		uint32_t nr = ends[c];

		ends[c] = at;
		at += nr;
	}
	for_each_touched(store, index) {
		uint64_t word = atomic_load(&store->region->slots[index]);

		if (claims_block(store, index, word))
			claims[ends[slot_place(word) >> store->region->chunk_shift]++] =
				(struct arena_claim){.place = slot_place(word),
						     .bytes = slot_length(word),
						     .owner = (uint32_t)index};
	}
}

static int compare_claims(const void *a, const void *b)
{
	const struct arena_claim *x = a;
	const struct arena_claim *y = b;

	return (x->place > y->place) - (x->place < y->place);
}

/* Keep the claims that do not overlap an earlier one; a tag names one owner, so of two claims to
 * one place at most one is sealed, and an overlap is damage. */
static uint32_t drop_overlaps(struct arena_claim *claims, uint32_t nr)
{
	uint64_t end = 0;
	uint32_t kept = 0;

	for (uint32_t i = 0; i < nr; i++) {
		uint64_t place = claims[i].place;

		if (kept && (place < end))
			continue;
		end = place + arena_words(claims[i].bytes);
		claims[kept++] = claims[i];
	}
	return kept;
}

static void rebuild_chunks(struct store *store, struct arena_claim *claims, const uint32_t *ends,
			   uint32_t nr_chunks)
{
	struct region *region = store->region;
	uint32_t from = 0;

	for (uint32_t c = 0; c < nr_chunks; from = ends[c++]) {
		uint32_t nr = ends[c] - from;

		if (!nr) {
			region->chunks[c].state = CHUNK_HOLE;
		} else if (region->chunks[c].state == CHUNK_WHOLE) {
			store->arena.nr_chunks++;
			store->arena.nr_whole++;
		} else {
			qsort(&claims[from], nr, sizeof(*claims), compare_claims);
			nr = drop_overlaps(&claims[from], nr);
			arena_rebuild_chunk(&store->arena, c, &claims[from], nr);
		}
	}
	region_reset_chunks(region);
}

/* Set the gauges from the slots. Returns the pages that cannot be read. */
static int64_t recount(struct store *store)
{
	struct counters *sets = store->region->header->counters;
	int64_t damaged = 0;

	for (int i = 0; i < REGION_NR_COUNTERS; i++) {
		sets[i].same_pages = sets[i].pages_stored = 0;
		sets[i].good_pages = sets[i].raw_pages = sets[i].compr_bytes = 0;
	}
	for_each_touched(store, index) {
		uint64_t word = atomic_load(&store->region->slots[index]);
		uint64_t target;

		store_count_page(&sets[0], word, 1);
		damaged += store_seal_target(store, index, word, &target) ||
			   !slot_is_sealed(word, target);
	}
	return damaged;
}

/* Where one map lost a bit, or a process died between the two, the other has it. */
static void mend_map(struct store *store)
{
	struct region *region = store->region;

	for (uint64_t at = 0; at < store->nr_pages; at += TABLE_SLOTS * 64) {
		uint64_t n = at / TABLE_SLOTS / 64;

		region->map[n] |= region->map_copy[n];
		region->map_copy[n] |= region->map[n];
	}
}

int64_t store_rebuild(struct store *store)
{
	uint32_t nr_chunks = atomic_load(&store->region->header->nr_chunks_touched);
	uint32_t *ends = calloc(nr_chunks + 1ULL, sizeof(*ends));
	struct arena_claim *claims = NULL;
	int64_t rv = -ENOMEM;
	uint64_t nr;

	if (!ends)
		goto out;
	mend_map(store);
	nr = count_claims(store, ends);
	claims = malloc((nr + 1) * sizeof(*claims));
	if (!claims)
		goto out;
	pthread_mutex_lock(&store->region->keeping);
	arena_fini(&store->arena);
	arena_init(&store->arena, store->region);
	collect_claims(store, claims, ends, nr_chunks);
	rebuild_chunks(store, claims, ends, nr_chunks);
	pthread_mutex_unlock(&store->region->keeping);
	rv = recount(store);
out:
	free(claims);
	free(ends);
	return rv;
}
