/* SPDX-License-Identifier: MIT
 *
 * Tests of compact.c: how dense it packs, what it leaves alone, and what cannot stop it. (Kills at
 * each step: test_crash.c; among other threads: test_threads.c.)
 */
#include "fixture.h"
#include "block.h"

#define NR_PAGES 3000

static uint8_t page[PAGE_BYTES];

struct scene {
	int fd;
	struct store *store;
	uint64_t seeds[NR_PAGES]; /* 0: empty */
	uint64_t seed;
};

static void scene_open(struct scene *s, uint32_t chunk_bytes, uint64_t mem_limit)
{
	memset(s, 0, sizeof(*s));
	s->fd = open_memory();
	s->store = open_store(s->fd, NR_PAGES, chunk_bytes, mem_limit, MIB);
	s->seed = chunk_bytes;
}

static void scene_close(struct scene *s)
{
	store_destroy(s->store);
	close(s->fd);
}

/* As memory pages compress: a third to a half mostly, some not at all. */
static void make_mixed(uint64_t seed)
{
	if (seed % 16 == 0)
		make_page(page, PAGE_RANDOM, seed);
	else
		make_page(page, PAGE_TEXT, seed);
}

static bool scene_write(struct scene *s, uint64_t i)
{
	uint64_t seed = next_random(&s->seed) | 1 << 20;

	make_mixed(seed);
	if (store_write(s->store, i, 1, page) != 1)
		return false;
	s->seeds[i] = seed;
	return true;
}

static void scene_discard(struct scene *s, uint64_t i)
{
	assert_true(store_discard(s->store, i, 1) >= 0);
	s->seeds[i] = 0;
}

/* All pages but @except hold what was written. */
static void assert_content(struct scene *s, uint64_t except)
{
	uint8_t got[PAGE_BYTES];

	for (uint64_t i = 0; i < NR_PAGES; i++) {
		if (i == except)
			continue;
		if (s->seeds[i])
			make_mixed(s->seeds[i]);
		else
			memset(page, 0, PAGE_BYTES);
		assert_int_equal(store_read(s->store, i, 1, got), 1);
		assert_memory_equal(got, page, PAGE_BYTES);
	}
}

static void fill(struct scene *s)
{
	for (uint64_t i = 0; i < NR_PAGES; i++)
		assert_true(scene_write(s, i));
}

static void discard_share(struct scene *s, uint32_t percent)
{
	for (uint64_t i = 0; i < NR_PAGES; i++)
		if (random_below(&s->seed, 100) < percent)
			scene_discard(s, i);
}

static double density(struct scene *s)
{
	struct store_stats now;

	region_settle(s->store->region);
	now = stats_of(s->store);
	return (double)now.mem_used_bytes / (double)now.compr_bytes;
}

/* From any state back to nearly what the content needs; a second time there is nothing to win. */
static void test_freed_memory_comes_back(void **state)
{
	(void)state;
	for (uint32_t percent = 20; percent <= 95; percent += 25) {
		static struct scene s;
		struct store_stats before, after;
		int64_t won;

		scene_open(&s, 65536, 0);
		fill(&s);
		discard_share(&s, percent);
		region_settle(s.store->region);
		before = stats_of(s.store);
		won = store_compact(s.store, UINT64_MAX);
		after = stats_of(s.store);
		assert_int_equal(won, before.mem_used_bytes - after.mem_used_bytes);
		assert_that(density(&s) < 1.03 || after.nr_chunks < 8, "%u %% freed: %.3f", percent,
			    density(&s));
		assert_true(after.pages_compacted > 0);
		assert_int_equal(store_compact(s.store, UINT64_MAX), 0);
		assert_sound(s.store);
		assert_content(&s, NR_PAGES);
		scene_close(&s);
	}
}

/* @max_bytes ends it early. */
static void test_compaction_in_parts(void **state)
{
	static struct scene s;
	uint64_t used;
	int64_t won;
	int parts = 0;

	(void)state;
	scene_open(&s, 65536, 0);
	fill(&s);
	discard_share(&s, 60);
	while ((won = store_compact(s.store, 1)) > 0) {
		assert_true(won <= 8 * (int64_t)MIB);
		assert_sound(s.store);
		parts++;
	}
	used = stats_of(s.store).mem_used_bytes;
	store_compact(s.store, UINT64_MAX);
	assert_int_equal(stats_of(s.store).mem_used_bytes, used);
	assert_true(parts > 1);
	assert_content(&s, NR_PAGES);
	scene_close(&s);
}

/* Compaction never needs more memory afterwards, and what a full store refuses before it, it takes
 * after it. */
static void test_compaction_at_the_limit(void **state)
{
	(void)state;
	for (uint32_t chunk = 8192; chunk <= 65536; chunk *= 2) {
		for (uint64_t round = 0; round < 30; round++) {
			static struct scene s;
			struct store_stats before, after;

			scene_open(&s, chunk, 16 * chunk);
			s.seed += round;
			for (int i = 0; i < 2000; i++) {
				uint64_t at = random_below(&s.seed, 400);

				if (random_below(&s.seed, 4))
					scene_write(&s, at);
				else
					scene_discard(&s, at);
			}
			region_settle(s.store->region);
			before = stats_of(s.store);
			store_compact(s.store, UINT64_MAX);
			after = stats_of(s.store);
			assert_that(after.mem_used_bytes <= before.mem_used_bytes,
				    "chunks of %u, round %llu: %llu bytes became %llu", chunk,
				    (unsigned long long)round,
				    (unsigned long long)before.mem_used_bytes,
				    (unsigned long long)after.mem_used_bytes);
			assert_sound(s.store);
			assert_content(&s, NR_PAGES);
			scene_close(&s);
		}
	}
}

/* Take up to @nr chunks. Return: how many the limit allows. */
static uint32_t take_chunks(struct region *region, bool compacting, uint32_t nr)
{
	uint32_t taken = 0;
	uint32_t chunk;
	int rv;

	while (taken < nr) {
		rv = region_take_chunk(region, compacting, &chunk);
		if (rv == -ENOSPC)
			break;
		if (rv == -EAGAIN)
			region_replenish(region);
		else
			taken++;
	}
	return taken;
}

static void give_chunks(struct region *region, uint32_t nr, uint8_t flags)
{
	for (uint32_t c = 0; nr && c < region_nr_touched(region); c++) {
		if (region->chunks[c].state != CHUNK_USED)
			continue;
		region->chunks[c].flags = flags;
		region_give_chunk(region, c);
		nr--;
	}
}

/* However near the limit is: a round can have its budget, and half of what writers could take
 * before it they can take meanwhile. What it gives back is not theirs before it ends, and never the
 * spare ones. */
static void a_round_leaves_chunks_to_writers(uint32_t room)
{
	enum { NR_CHUNKS = 100, SPARE = 8 };
	int fd = open_memory();
	struct store *store = open_store(fd, NR_PAGES, 65536, NR_CHUNKS * 65536, NR_CHUNKS * 65536);
	struct region *region = store->region;
	uint32_t used = NR_CHUNKS - room;
	uint32_t budget, share;

	assert_int_equal(take_chunks(region, false, used), used);
	region_replenish(region);
	region_hold(region, 64);
	budget = region_compaction_budget(region);
	assert_in_range(budget, room / 2, SPARE + (room - SPARE) / 2);
	share = take_chunks(region, false, 1);
	share += take_chunks(region, true, budget) - budget;
	share += take_chunks(region, false, NR_CHUNKS);
	assert_int_equal(share, room - (budget < SPARE ? SPARE : budget));
	assert_in_range(share, (room - SPARE) / 2, room);
	give_chunks(region, budget, CHUNK_ISOLATED);
	assert_int_equal(take_chunks(region, false, NR_CHUNKS), 0);
	region_end_round(region);
	region_hold(region, 0);
	used += share + take_chunks(region, false, NR_CHUNKS);
	assert_int_equal(used, NR_CHUNKS - SPARE);
	give_chunks(region, used, 0);
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

static void test_a_round_leaves_chunks_to_writers(void **state)
{
	(void)state;
	for (uint32_t room = 9; room <= 100; room++)
		a_round_leaves_chunks_to_writers(room);
}

static struct scene *churned;
static uint64_t nr_churns;

/* What others may do while compaction runs, between two rounds. */
void __real_region_settle(struct region *region);
void __wrap_region_settle(struct region *region);
void __wrap_region_settle(struct region *region)
{
	__real_region_settle(region);
	if (!churned || nr_churns++ > 200)
		return;
	for (uint64_t i = 0; i < NR_PAGES; i++)
		if (!churned->seeds[i])
			assert_true(scene_write(churned, i));
	discard_share(churned, 40);
}

/* Each round leaves something to win. */
static void test_compaction_ends_among_writes_and_frees(void **state)
{
	static struct scene s;
	struct store_stats before;

	(void)state;
	scene_open(&s, 65536, 0);
	fill(&s);
	discard_share(&s, 40);
	before = stats_of(s.store);
	churned = &s;
	nr_churns = 0;
	assert_true(store_compact(s.store, UINT64_MAX) > 0);
	churned = NULL;
	assert_in_range(nr_churns, 2, 1 + before.free_bytes / 65536);
	assert_sound(s.store);
	assert_content(&s, NR_PAGES);
	scene_close(&s);
}

/* A page that another thread holds is left where it is. */
static void test_busy_pages_are_skipped(void **state)
{
	static struct scene s;

	(void)state;
	scene_open(&s, 65536, 0);
	fill(&s);
	discard_share(&s, 60);
	for (uint64_t i = 7; i < NR_PAGES; i += 400)
		slot_lock(&s.store->region->slots[i]);
	assert_true(store_compact(s.store, UINT64_MAX) > 0);
	for (uint64_t i = 7; i < NR_PAGES; i += 400)
		slot_unlock(&s.store->region->slots[i]);
	assert_sound(s.store);
	store_compact(s.store, UINT64_MAX);
	assert_that(density(&s) < 1.03, "%.3f", density(&s));
	assert_content(&s, NR_PAGES);
	scene_close(&s);
}

static bool has_block(struct scene *s, uint64_t i)
{
	return slot_has_block(atomic_load(&s->store->region->slots[i]));
}

static uint32_t chunk_of_page(struct scene *s, uint64_t i)
{
	return arena_chunk_of(&s->store->arena,
			      store_place(s->store, atomic_load(&s->store->region->slots[i])));
}

static struct block *block_of(struct scene *s, uint64_t i)
{
	return block_at(&s->store->arena,
			store_place(s->store, atomic_load(&s->store->region->slots[i])));
}

/* A damaged page, whatever is damaged of it, keeps its chunk, and no other. */
static void damage_is_no_obstacle(void (*damage)(struct scene *, uint64_t))
{
	static struct scene s;
	uint64_t page_at = 0;
	uint32_t chunk;

	scene_open(&s, 65536, 0);
	fill(&s);
	discard_share(&s, 60);
	while (!s.seeds[page_at] || !has_block(&s, page_at))
		page_at++;
	chunk = chunk_of_page(&s, page_at);
	for (uint64_t i = 0; i < NR_PAGES; i++) /* the sparsest of all */
		if (i != page_at && has_block(&s, i) && chunk_of_page(&s, i) == chunk)
			scene_discard(&s, i);
	damage(&s, page_at);
	store_compact(s.store, UINT64_MAX);
	assert_content(&s, page_at);
	assert_that(density(&s) < 1.05, "%.3f", density(&s));
	store_discard(s.store, page_at, 1);
	assert_int_equal(store_rebuild(s.store), 0);
	assert_sound(s.store);
	scene_close(&s);
}

static void damage_slot(struct scene *s, uint64_t i)
{
	atomic_fetch_xor(&s->store->region->slots[i], 1ULL << 60);
}

static void damage_owner(struct scene *s, uint64_t i)
{
	block_of(s, i)->tag.owner ^= 1U << 31;
}

static void damage_checksum(struct scene *s, uint64_t i)
{
	block_of(s, i)->tag.checksum ^= 1;
}

static void damage_size(struct scene *s, uint64_t i)
{
	block_of(s, i)->size ^= 0x100;
}

static void damage_prev(struct scene *s, uint64_t i)
{
	block_of(s, i)->prev ^= 0x100;
}

static void test_damage_does_not_stop_compaction(void **state)
{
	(void)state;
	damage_is_no_obstacle(damage_slot);
	damage_is_no_obstacle(damage_owner);
	damage_is_no_obstacle(damage_checksum);
	damage_is_no_obstacle(damage_size);
	damage_is_no_obstacle(damage_prev);
}

/* More blocks than one round notes, in chunks that say that they hold one each. */
static void test_damaged_counts_are_not_believed(void **state)
{
	enum { NR_SMALL = 60000, MAX_MOVES = 32768 };
	int fd = open_memory();
	struct store *store = open_store(fd, NR_SMALL, 65536, 0, 4 * MIB);
	uint8_t got[PAGE_BYTES];

	(void)state;
	for (uint64_t i = 0; i < NR_SMALL; i++) {
		make_page(page, PAGE_ALMOST_SAME, i);
		assert_int_equal(store_write(store, i, 1, page), 1);
	}
	for (uint64_t i = 0; i < NR_SMALL; i += 5)
		assert_int_equal(store_discard(store, i, 2), 2);
	for (uint32_t c = 0; c < region_nr_touched(store->region); c++)
		if (store->region->chunks[c].state == CHUNK_USED)
			store->region->chunks[c].nr_blocks = 1;
	store_compact(store, 1);
	assert_in_range(stats_of(store).pages_compacted, MAX_MOVES / 2, MAX_MOVES);
	assert_int_equal(store_rebuild(store), 0);
	assert_sound(store);
	for (uint64_t i = 0; i < NR_SMALL; i++) {
		memset(page, 0, PAGE_BYTES);
		if (i % 5 >= 2)
			make_page(page, PAGE_ALMOST_SAME, i);
		assert_int_equal(store_read(store, i, 1, got), 1);
		assert_memory_equal(got, page, PAGE_BYTES);
	}
	store_destroy(store);
	close(fd);
}

/* An empty store, one page, only raw pages, only same-filled ones. */
static void test_nothing_to_win(void **state)
{
	static struct scene s;

	(void)state;
	scene_open(&s, 65536, 0);
	assert_int_equal(store_compact(s.store, UINT64_MAX), 0);
	for (uint64_t i = 0; i < 100; i++) {
		make_page(page, PAGE_WORD_64, i);
		assert_int_equal(store_write(s.store, i, 1, page), 1);
	}
	assert_int_equal(store_compact(s.store, UINT64_MAX), 0);
	assert_int_equal(store_discard(s.store, 0, 100), 100);
	for (uint64_t i = 0; i < 150; i++) {
		make_page(page, PAGE_RANDOM, i);
		assert_int_equal(store_write(s.store, i, 1, page), 1);
	}
	assert_int_equal(store_compact(s.store, UINT64_MAX), 0);
	assert_sound(s.store);
	scene_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_freed_memory_comes_back),
		cmocka_unit_test(test_compaction_in_parts),
		cmocka_unit_test(test_compaction_at_the_limit),
		cmocka_unit_test(test_a_round_leaves_chunks_to_writers),
		cmocka_unit_test(test_compaction_ends_among_writes_and_frees),
		cmocka_unit_test(test_busy_pages_are_skipped),
		cmocka_unit_test(test_damage_does_not_stop_compaction),
		cmocka_unit_test(test_damaged_counts_are_not_believed),
		cmocka_unit_test(test_nothing_to_win),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
