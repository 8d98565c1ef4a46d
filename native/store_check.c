/* SPDX-License-Identifier: MIT
 *
 * store_check - the slot table is the truth: compare everything with it, or recreate it from it
 */
#define _GNU_SOURCE
#include "store.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

/* One set may have been read before a page was counted in it, another after that page was counted
 * out of there: what is next to nothing then seems to be below it. */
static void floor_gauges(struct counters *sum)
{
	_Atomic uint64_t *gauges[] = {&sum->same_pages, &sum->pages_stored, &sum->good_pages,
				      &sum->raw_pages, &sum->compr_bytes};

	for (int i = 0; i < 5; i++)
		if ((int64_t)*gauges[i] < 0)
			*gauges[i] = 0;
}

int store_get_stats(struct store *store, struct store_stats *out)
{
	const struct region_header *h = store->region->header;
	struct counters sum;

	sum_gauges(store, &sum);
	floor_gauges(&sum);
	*out = (struct store_stats){
		.nr_pages = store->nr_pages,
		.mem_limit = store->region->geometry.mem_limit,
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
	struct scratch *s = store_enter(store);
	int rv = store_load(store, index, word, s->page);

	codec_fill(s->page, 0);
	store_leave(s);
	if (word & SLOT_LOCK)
		return FAULT(message, "slot %llu is locked", (unsigned long long)index);
	if (rv)
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
	return slot_has_block(word) && store_place(store, word) == place;
}

/* Every allocated block is named by its owner's slot; slots name as many blocks as there are, so
 * that no block has two. */
static int check_owners(struct store *store, uint64_t nr_blocks, char *message)
{
	const struct region *region = store->region;
	uint32_t touched = region_nr_touched(region);
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

int store_check(struct store *store, char *message)
{
	struct tally tally = {0};
	int rv = arena_check(&store->arena, message);

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

/* What rebuild finds out about a chunk. */
struct chunk_claims {
	uint32_t first; /* among all claims */
	uint32_t nr;
};

/* Where a slot says its block is, before anything there is looked at. Is that inside a chunk? */
static bool names_place(const struct store *store, uint64_t word)
{
	const struct region *region = store->region;
	uint64_t place = store_place(store, word);
	uint32_t offset = (uint32_t)(place & (region->chunk_words - 1));
	uint32_t words = arena_words(slot_length(word));

	if (!slot_has_block(word) || place >> region->chunk_shift >= region->nr_chunks)
		return false;
	if (words > region->chunk_words)
		return offset == 0;
	return (offset == 0 || offset >= BLOCK_MIN_WORDS) && offset + words <= region->chunk_words;
}

static bool is_whole(const struct store *store, uint32_t bytes)
{
	return arena_words(bytes) > store->region->chunk_words;
}

static bool is_sound(const struct store *store, uint64_t index, uint64_t word)
{
	uint64_t target;

	return !store_seal_target(store, index, word, &target) && slot_is_sealed(word, target);
}

/* Can a slot's word be trusted to say where its block is? Whether the tag is in the chunk table is
 * the slot's to say, too. */
static bool claims_block(const struct store *store, uint64_t index, uint64_t word)
{
	struct chunk *chunk;

	if (store->arena.has_whole) {
		chunk = &store->region
				 ->chunks[store_place(store, word) >> store->region->chunk_shift];
		chunk->state = is_whole(store, slot_length(word)) ? CHUNK_WHOLE : CHUNK_USED;
	}
	return is_sound(store, index, word);
}

/* Unlock every slot; count how many name each chunk. Returns how many there are. */
static uint64_t count_claims(struct store *store, struct chunk_claims *chunks)
{
	uint64_t nr = 0;

	for_each_touched(store, index) {
		uint64_t word = atomic_load(&store->region->slots[index]);

		if (word & SLOT_LOCK)
			slot_unlock(&store->region->slots[index]);
		if (names_place(store, word)) {
			chunks[store_place(store, word) >> store->region->chunk_shift].nr++;
			nr++;
		}
	}
	return nr;
}

/* Give each chunk its part of the claims. Returns the chunks up to the last that has any. */
static uint32_t divide_claims(const struct store *store, struct chunk_claims *chunks)
{
	uint32_t nr_chunks = 0;
	uint32_t at = 0;

	for (uint32_t c = 0; c < store->region->nr_chunks; c++) {
		uint32_t nr = chunks[c].nr;

		if (!nr)
			continue;
		chunks[c] = (struct chunk_claims){.first = at};
		at += nr;
		nr_chunks = c + 1;
	}
	return nr_chunks;
}

static void forget_gauges(struct counters *sets)
{
	for (int i = 0; i < REGION_NR_COUNTERS; i++) {
		sets[i].same_pages = sets[i].pages_stored = 0;
		sets[i].good_pages = sets[i].raw_pages = sets[i].compr_bytes = 0;
	}
}

/* Sort by chunk what slots claim, set the gauges. Returns the pages that cannot be read, as far as
 * slots alone can tell. */
static int64_t collect_claims(struct store *store, struct arena_claim *claims,
			      struct chunk_claims *chunks)
{
	struct region *region = store->region;
	int64_t damaged = 0;

	forget_gauges(region->header->counters);
	atomic_store(&region->words_used, false);
	for_each_touched(store, index) {
		uint64_t word = atomic_load_explicit(&region->slots[index], memory_order_relaxed);
		struct chunk_claims *chunk;

		store_count_page(&region->header->counters[0], word, 1);
		if (slot_has_word(word))
			atomic_store_explicit(&region->words_used, true, memory_order_relaxed);
		if (!names_place(store, word)) {
			damaged += slot_has_block(word) || !is_sound(store, index, word);
			continue;
		}
		chunk = &chunks[store_place(store, word) >> region->chunk_shift];
		claims[chunk->first + chunk->nr++] =
			(struct arena_claim){.place = store_place(store, word),
					     .bytes = slot_length(word),
					     .owner = (uint32_t)index};
	}
	return damaged;
}

/* Clear what no slot names on one page of the word table. */
static void clear_words(struct store *store, uint64_t page)
{
	const struct region *region = store->region;
	const uint64_t each = PAGE_BYTES / (2 * sizeof(*region->words));

	for (uint64_t i = page * each; i < (page + 1) * each; i++) {
		uint64_t named = UINT64_MAX;

		if (i >= store->nr_pages || !region_touched(region, i))
			return;
		if (slot_has_word(region->slots[i]))
			named = slot_word_at(i, slot_state(region->slots[i]));
		for (uint64_t at = 2 * i; at <= 2 * i + 1; at++)
			if (at != named && region->words[at])
				region->words[at] = 0;
	}
}

/* A worker that died between writing a word and naming it, or before it cleared the old one, left
 * eight bytes of a page. Only pages of the word table that are there are looked at. */
static void clear_unnamed_words(struct store *store)
{
	const struct region_geometry *g = &store->region->geometry;
	off_t at = (off_t)g->word_off;

	while ((at = lseek(store->region->fd, at, SEEK_DATA)) >= 0 && at < (off_t)g->chunk_off) {
		clear_words(store, ((uint64_t)at - g->word_off) / PAGE_BYTES);
		at += PAGE_BYTES;
	}
}

/* Keep the claims that the blocks confirm. Only here are blocks looked at, a chunk at a time: in the
 * slots' order they are all over memory, and 2 million of them took 0.9 s instead of 0.3 s. */
static uint32_t drop_unsound(struct store *store, struct arena_claim *claims, uint32_t nr)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < nr; i++) {
		uint64_t index = claims[i].owner;

		if (claims_block(store, index, atomic_load(&store->region->slots[index])))
			claims[kept++] = claims[i];
	}
	return kept;
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

/* Returns how many claims the blocks do not confirm. */
static uint32_t rebuild_chunk(struct store *store, uint32_t c, struct arena_claim *claims,
			      uint32_t nr)
{
	struct chunk *chunk = &store->region->chunks[c];
	uint32_t nr_sound;

	qsort(claims, nr, sizeof(*claims), compare_claims);
	nr_sound = drop_unsound(store, claims, nr);
	if (!nr_sound) {
		/* What nobody names may be of the reserve: region_reset_chunks() looks. */
		if (nr || chunk->state != CHUNK_READY)
			chunk->state = CHUNK_HOLE;
		return nr;
	}
	nr -= nr_sound;
	nr_sound = drop_overlaps(claims, nr_sound);
	if (is_whole(store, claims->bytes)) {
		chunk->state = CHUNK_WHOLE;
		store->arena.nr_chunks++;
		store->arena.nr_whole++;
	} else {
		arena_rebuild_chunk(&store->arena, c, claims, nr_sound);
	}
	return nr;
}

/* With region->keeping. */
static int64_t rebuild(struct store *store, struct chunk_claims *chunks)
{
	uint64_t nr_claims = count_claims(store, chunks);
	uint32_t nr_chunks = divide_claims(store, chunks);
	struct arena_claim *claims = malloc((nr_claims + 1) * sizeof(*claims));
	int64_t damaged;

	if (!claims)
		return -ENOMEM;
	arena_fini(&store->arena);
	arena_init(&store->arena, store->region);
	damaged = collect_claims(store, claims, chunks);
	clear_unnamed_words(store);
	for (uint32_t c = 0; c < nr_chunks; c++)
		damaged += rebuild_chunk(store, c, claims + chunks[c].first, chunks[c].nr);
	region_reset_chunks(store->region, nr_chunks);
	free(claims);
	return damaged;
}

int64_t store_rebuild(struct store *store)
{
	struct region *region = store->region;
	struct chunk_claims *chunks = calloc(region->nr_chunks, sizeof(*chunks));
	uint32_t nr_touched;
	int64_t rv;

	if (!chunks)
		return -ENOMEM;
	pthread_mutex_lock(&region->keeping);
	region_mend(region);
	/* Any chunk may be in use. */
	nr_touched = atomic_exchange(&region->nr_touched, region->nr_chunks);
	rv = rebuild(store, chunks);
	if (rv < 0)
		atomic_store(&region->nr_touched, nr_touched);
	pthread_mutex_unlock(&region->keeping);
	free(chunks);
	return rv;
}
