/* SPDX-License-Identifier: MIT
 *
 * region_tables - pages of the tables are there before they are touched
 *
 * Chunks are touched in rising order, under region->lock, which all lanes want: their entries in
 * the chunk table are populated ahead.
 *
 * A lane that touched a hole would have the kernel allocate memory, maybe while the kernel waits
 * for that lane to store a page. So the keeper populates, as with chunks, what will be touched
 * next. One page of the slot table is 512 pages of the file, which is a cluster of Linux's swap: it
 * takes fresh clusters in an order of its own, one behind the other or in equal steps (several
 * CPUs at once, so not quite in order). Where a cluster that is touched for the first time has
 * two touched ones before it in equal steps, those in such steps behind it are populated. What is
 * guessed wrong costs MAX_UNUSED pages at the most; a lane that comes first, or elsewhere, gets its
 * memory itself.
 *
 * The word table has two pages for each of these; they follow once any word was ever put there.
 */
#include "region.h"

#define TABLE_AHEAD 6  /* pages of the slot table */
#define MAX_STEP 64    /* clusters; larger steps are likely chance */
#define MAX_UNUSED 128 /* pages populated ahead, and not touched yet: 512 KiB */

static uint64_t nr_table_pages(const struct region *region)
{
	return (region->geometry.nr_pages + TABLE_SLOTS - 1) / TABLE_SLOTS;
}

/* Remember that a page is populated; returns whether it shall be, and was not before. */
static bool take_page(struct region *region, uint64_t page)
{
	uint64_t bit = 1ULL << page % 64;
	bool take;

	pthread_mutex_lock(&region->lock);
	take = !(region->ahead[page / 64] & bit) && region->nr_unused < MAX_UNUSED &&
	       !region_touched(region, page * TABLE_SLOTS);
	if (take) {
		region->ahead[page / 64] |= bit;
		region->nr_unused++;
	}
	pthread_mutex_unlock(&region->lock);
	return take;
}

static void populate_page(struct region *region, uint64_t page)
{
	const struct region_geometry *g = &region->geometry;

	if (page >= nr_table_pages(region) || !take_page(region, page))
		return;
	if (region_populate(region, g->slot_off + page * PAGE_BYTES, PAGE_BYTES))
		return;
	if (atomic_load_explicit(&region->words_used, memory_order_relaxed)) {
		uint64_t at = g->word_off + page * 2 * PAGE_BYTES;
		uint64_t left = g->chunk_off - at;

		region_populate(region, at, left < 2 * PAGE_BYTES ? left : 2 * PAGE_BYTES);
	}
}

static bool is_step(const struct region *region, uint64_t page, uint64_t step)
{
	return step && step <= MAX_STEP && 2 * step <= page &&
	       region_touched(region, (page - step) * TABLE_SLOTS) &&
	       region_touched(region, (page - 2 * step) * TABLE_SLOTS);
}

/* The smallest step that leads to @page, or 0. */
static uint64_t find_step(const struct region *region, uint64_t page)
{
	uint64_t smallest = is_step(region, page, 1);

	for (uint32_t i = 0; i < REGION_NR_FRESH; i++) {
		uint64_t step = page - region->fresh_before[i];

		if (page > region->fresh_before[i] && (!smallest || step < smallest) &&
		    is_step(region, page, step))
			smallest = step;
	}
	return smallest;
}

void region_populate_tables(struct region *region)
{
	uint64_t page = region->fresh - 1;
	uint64_t step;

	region->fresh = 0;
	pthread_mutex_unlock(&region->lock);
	step = find_step(region, page);
	for (uint64_t i = 1; step && i <= TABLE_AHEAD; i++)
		populate_page(region, page + i * step);
	region->fresh_before[region->nr_fresh++ % REGION_NR_FRESH] = page;
	pthread_mutex_lock(&region->lock);
}

void region_populate_entries(struct region *region, uint32_t more)
{
	const struct region_geometry *g = &region->geometry;
	uint32_t touched = region_nr_touched(region);
	uint32_t left = region->nr_chunks - touched;
	uint64_t need = touched + (left < more ? left : more);
	uint64_t from = touched > region->nr_entries ? touched : region->nr_entries;
	uint64_t at = from * sizeof(struct chunk) / PAGE_BYTES * PAGE_BYTES;
	uint64_t end = (need * sizeof(struct chunk) + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;

	if (need <= region->nr_entries || region_populate(region, g->chunk_off + at, end - at))
		return;
	end /= sizeof(struct chunk);
	region->nr_entries = end < region->nr_chunks ? (uint32_t)end : region->nr_chunks;
}

void region_note_fresh(struct region *region, uint64_t page)
{
	pthread_mutex_lock(&region->lock);
	region->fresh = page + 1;
	/* The bit stays: the page is not populated again. */
	if (region->ahead[page / 64] >> page % 64 & 1)
		region->nr_unused--;
	pthread_cond_signal(&region->work);
	pthread_mutex_unlock(&region->lock);
}
