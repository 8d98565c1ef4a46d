/* SPDX-License-Identifier: MIT
 *
 * Tests of arena.c: what it gives never overlaps, what comes back is merged and returned, and
 * damaged tags cost memory at the most.
 */
#include "fixture.h"
#include "block.h"

#define MAX_BLOCKS 600
#define RESERVE 4 /* chunks */

struct piece {
	uint64_t place;
	uint32_t bytes;
	uint32_t owner;
	uint8_t pattern;
	bool is_damaged; /* its header was: its content may be lost, and nobody else's */
};

struct fixture {
	int fd;
	struct arena arena;
	struct piece pieces[MAX_BLOCKS];
	uint32_t nr;
	uint32_t nr_made;
};

/* Have the first chunks come in rising order, however the reserve was filled. */
static void order_reserve(struct region *region)
{
	uint32_t chunks[RESERVE], nr = 0;

	region_replenish(region);
	while (nr < RESERVE && !region_take_chunk(region, false, &chunks[nr]))
		nr++;
	for (uint32_t c = RESERVE; c-- > 0;)
		for (uint32_t i = 0; i < nr; i++)
			if (chunks[i] == c)
				region_give_chunk(region, c);
}

static void open_arena(struct fixture *f, uint32_t chunk_bytes, uint64_t mem_limit)
{
	struct store_options options = {.nr_pages = 4096,
					.mem_limit = mem_limit,
					.reserve_bytes = RESERVE * chunk_bytes,
					.chunk_bytes = chunk_bytes};
	struct region *region;

	f->nr = f->nr_made = 0;
	f->fd = open_memory();
	assert_int_equal(region_format(f->fd, &options), 0);
	assert_int_equal(region_map(&region, f->fd), 0);
	order_reserve(region);
	assert_int_equal(region_start_keeper(region), 0);
	assert_int_equal(arena_init(&f->arena, region), 0);
}

static void close_arena(struct fixture *f)
{
	region_destroy(f->arena.region);
	arena_fini(&f->arena);
	close(f->fd);
}

static void assert_arena_sound(struct fixture *f)
{
	char message[160];

	assert_that(arena_check(&f->arena, message) == 0, "arena_check: %s", message);
}

static int try_alloc(struct fixture *f, uint32_t bytes, uint32_t owner, bool compacting,
		     uint64_t *place)
{
	int rv;

	do {
		arena_lock(&f->arena);
		rv = arena_alloc(&f->arena, bytes, owner, compacting, place);
		arena_unlock(&f->arena);
	} while (rv == -EAGAIN && !wait_ready(f->arena.region, compacting));
	return rv;
}

/* Returns the piece's index; its payload is filled with its pattern. */
static uint32_t alloc(struct fixture *f, uint32_t bytes)
{
	struct piece *p = &f->pieces[f->nr];

	assert_true(f->nr < MAX_BLOCKS);
	p->bytes = bytes;
	p->pattern = (uint8_t)(1 + f->nr_made++ % 251);
	p->owner = f->nr_made;
	p->is_damaged = false;
	assert_int_equal(try_alloc(f, bytes, p->owner, false, &p->place), 0);
	assert_true(arena_holds(&f->arena, p->place, bytes));
	assert_int_equal(arena_tag(&f->arena, p->place)->owner, f->nr_made);
	memset(arena_payload(&f->arena, p->place), p->pattern, bytes);
	return f->nr++;
}

static void assert_piece_intact(const struct fixture *f, const struct piece *p)
{
	const uint8_t *bytes = arena_payload(&f->arena, p->place);

	if (p->is_damaged || !p->bytes)
		return;
	assert_that(bytes[0] == p->pattern && !memcmp(bytes, bytes + 1, p->bytes - 1),
		    "block %llu of %u bytes has changed", (unsigned long long)p->place, p->bytes);
}

/* Free a piece; the last one takes its index. Returns what arena_free() did. */
static int drop(struct fixture *f, uint32_t i)
{
	struct piece p = f->pieces[i];
	int rv = -EUCLEAN;

	assert_piece_intact(f, &p);
	f->pieces[i] = f->pieces[--f->nr];
	/* As the store does it, whose slot names its block's owner and checksum. */
	if (p.is_damaged && (!arena_holds(&f->arena, p.place, p.bytes) ||
			     arena_tag(&f->arena, p.place)->owner != p.owner))
		return rv;
	arena_wipe(&f->arena, p.place, p.bytes);
	arena_lock(&f->arena);
	rv = arena_free(&f->arena, p.place);
	arena_unlock(&f->arena);
	return rv;
}

static void assert_empty(struct fixture *f)
{
	assert_arena_sound(f);
	assert_int_equal(f->arena.nr_chunks, 0);
	assert_int_equal(f->arena.live_words, 0);
	assert_int_equal(arena_free_words(&f->arena), 0);
	assert_int_equal(f->arena.region->nr_used, 0);
	assert_int_equal(f->arena.class_map, 0);
}

/* Every size of payload fits what it was given, and goes back whole. */
static void test_every_size(void **state)
{
	(void)state;
	for (uint32_t chunk = 4096; chunk <= 65536; chunk *= 2) {
		static struct fixture f;

		open_arena(&f, chunk, 0);
		for (uint32_t bytes = 1; bytes <= PAGE_BYTES; bytes += bytes < 40 ? 1 : 13)
			alloc(&f, bytes);
		alloc(&f, PAGE_BYTES);
		assert_arena_sound(&f);
		while (f.nr)
			assert_int_equal(drop(&f, f.nr / 2), 0);
		assert_empty(&f);
		close_arena(&f);
	}
}

/* A request gets the smallest free block that holds it. */
static void test_best_fit(void **state)
{
	static const uint32_t sizes[] = {4000, 100, 900, 1000, 904, 2000, 896};
	static struct fixture f;
	uint64_t places[ARRAY_SIZE(sizes)], place;

	(void)state;
	open_arena(&f, 65536, 0);
	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		assert_int_equal(try_alloc(&f, sizes[i], 1, false, &places[i]), 0);
		assert_int_equal(try_alloc(&f, 16, 2, false, &place), 0); /* keeps holes apart */
	}
	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		arena_wipe(&f.arena, places[i], sizes[i]);
		assert_int_equal(arena_free(&f.arena, places[i]), 0);
	}
	assert_arena_sound(&f);
	assert_int_equal(try_alloc(&f, 897, 3, false, &place), 0);
	assert_int_equal(place, places[2]); /* 900: 897 and 900 take equally many words */
	assert_int_equal(try_alloc(&f, 896, 3, false, &place), 0);
	assert_int_equal(place, places[6]);
	assert_int_equal(try_alloc(&f, 901, 3, false, &place), 0);
	assert_int_equal(place, places[4]);
	assert_int_equal(try_alloc(&f, 1500, 3, false, &place), 0);
	assert_int_equal(place, places[5]);
	assert_int_equal(try_alloc(&f, 1, 3, false, &place), 0);
	assert_int_equal(place, places[1]);
	close_arena(&f);
}

/* Neighbours merge, in whichever order they are freed. */
static void test_neighbours_merge_in_any_order(void **state)
{
	static const uint8_t orders[][4] = {
		{0, 1, 2, 3}, {3, 2, 1, 0}, {0, 2, 1, 3}, {1, 3, 2, 0}, {2, 0, 3, 1},
	};

	(void)state;
	for (size_t o = 0; o < ARRAY_SIZE(orders); o++) {
		static struct fixture f;
		uint64_t places[4], guard;

		open_arena(&f, 65536, 0);
		for (int i = 0; i < 4; i++)
			assert_int_equal(try_alloc(&f, 500, 1, false, &places[i]), 0);
		assert_int_equal(try_alloc(&f, 4096, 2, false, &guard), 0);
		for (int i = 0; i < 4; i++) {
			arena_free(&f.arena, places[orders[o][i]]);
			assert_arena_sound(&f);
		}
		assert_int_equal(block_words(block_at(&f.arena, places[0])), 4 * arena_words(500));
		arena_free(&f.arena, guard);
		assert_empty(&f);
		close_arena(&f);
	}
}

/* A rest too small for a free block's header belongs to the block, and comes back with it. */
static void test_small_rests_are_not_lost(void **state)
{
	(void)state;
	for (uint32_t less = 0; less <= 24; less += 4) {
		static struct fixture f;
		uint64_t place, guard, again;

		open_arena(&f, 65536, 0);
		assert_int_equal(try_alloc(&f, 1000, 1, false, &place), 0);
		assert_int_equal(try_alloc(&f, 100, 2, false, &guard), 0);
		arena_free(&f.arena, place);
		assert_int_equal(try_alloc(&f, 1000 - less, 3, false, &again), 0);
		assert_int_equal(again, place);
		assert_true(arena_holds(&f.arena, again, 1000 - less));
		assert_arena_sound(&f);
		arena_free(&f.arena, again);
		assert_arena_sound(&f);
		assert_int_equal(block_words(block_at(&f.arena, place)), arena_words(1000));
		arena_free(&f.arena, guard);
		assert_empty(&f);
		close_arena(&f);
	}
}

/* One step of a random history. */
static void churn(struct fixture *f, uint64_t *seed, uint32_t most)
{
	uint32_t bytes = 1 + (uint32_t)random_below(seed, random_below(seed, 3) ? 3072 : 64);

	if (random_below(seed, 20) == 0)
		bytes = PAGE_BYTES;
	if (f->nr < most && random_below(seed, 100) < 55)
		alloc(f, bytes);
	else if (f->nr)
		assert_int_equal(drop(f, (uint32_t)random_below(seed, f->nr)), 0);
}

/* Random histories: nothing overlaps, all that is promised holds after each step. */
static void test_random_histories(void **state)
{
	(void)state;
	for (uint32_t chunk = 4096; chunk <= 65536; chunk *= 2) {
		static struct fixture f;
		uint64_t seed = chunk;

		open_arena(&f, chunk, 0);
		for (int i = 0; i < 1500; i++) {
			churn(&f, &seed, 150);
			assert_arena_sound(&f);
		}
		while (f.nr)
			assert_int_equal(drop(&f, (uint32_t)random_below(&seed, f.nr)), 0);
		assert_empty(&f);
		close_arena(&f);
	}
}

/* Above the limit: -ENOSPC, nothing changed; after a free it goes on. */
static void test_limit(void **state)
{
	(void)state;
	for (uint32_t chunk = 4096; chunk <= 65536; chunk *= 4) {
		static struct fixture f;
		uint64_t place;

		open_arena(&f, chunk, 16 * chunk);
		while (try_alloc(&f, PAGE_BYTES, 1, false, &place) == 0) {
			f.pieces[f.nr].pattern = 7;
			f.pieces[f.nr].bytes = PAGE_BYTES;
			f.pieces[f.nr++].place = place;
			memset(arena_payload(&f.arena, place), 7, PAGE_BYTES);
		}
		assert_int_equal(f.arena.nr_chunks, 16 - 2); /* an eighth is compaction's */
		assert_arena_sound(&f);
		for (int i = 0; i < 100; i++)
			assert_int_equal(try_alloc(&f, PAGE_BYTES, 1, false, &place), -ENOSPC);
		assert_arena_sound(&f);
		drop(&f, 3);
		assert_int_equal(try_alloc(&f, PAGE_BYTES, 1, false, &place), 0);
		assert_int_equal(try_alloc(&f, PAGE_BYTES, 1, true, &place), 0);
		assert_arena_sound(&f);
		close_arena(&f);
	}
}

/* Places that are no block's are refused, and so is the second free of one. */
static void test_wrong_places_are_not_freed(void **state)
{
	(void)state;
	for (uint32_t chunk = 16384; chunk <= 65536; chunk *= 2) {
		static struct fixture f;
		uint64_t seed = chunk;
		struct piece twice;

		open_arena(&f, chunk, 0);
		for (int i = 0; i < 200; i++)
			churn(&f, &seed, 40);
		twice = f.pieces[0];
		drop(&f, 0);
		assert_int_equal(arena_free(&f.arena, twice.place), -EUCLEAN);
		for (uint32_t i = 0; i < f.nr; i++) {
			uint32_t words = arena_words(f.pieces[i].bytes);

			for (uint32_t at = 1; at < words; at += 3)
				assert_int_equal(arena_free(&f.arena, f.pieces[i].place + at),
						 -EUCLEAN);
		}
		assert_true(f.arena.nr_damaged > 1);
		assert_arena_sound(&f);
		while (f.nr)
			assert_int_equal(drop(&f, 0), 0);
		assert_empty(&f);
		close_arena(&f);
	}
}

/* arena_holds() says no to what cannot be a block of that length. */
static void test_holds_needs_a_block_of_that_length(void **state)
{
	static struct fixture f;
	uint64_t place, end;

	(void)state;
	open_arena(&f, 65536, 0);
	assert_int_equal(try_alloc(&f, 1000, 1, false, &place), 0);
	end = (uint64_t)f.arena.region->nr_chunks * f.arena.region->chunk_words;
	assert_true(arena_holds(&f.arena, place, 1000));
	assert_true(arena_holds(&f.arena, place, 997)); /* as many words */
	assert_false(arena_holds(&f.arena, place, 1004 + 12));
	assert_false(arena_holds(&f.arena, place, 980));
	assert_false(arena_holds(&f.arena, place, PAGE_BYTES));
	assert_false(arena_holds(&f.arena, place + arena_words(1000), 1000)); /* free */
	assert_false(arena_holds(&f.arena, end - 1, 1000));
	assert_false(arena_holds(&f.arena, end - arena_words(1000), 1000));
	assert_false(arena_holds(&f.arena, end, 1000));
	assert_false(arena_holds(&f.arena, (1ULL << SLOT_PLACE_BITS) - 1, 1000));
	close_arena(&f);
}

static uint32_t chunk_of_piece(const struct fixture *f, uint32_t i)
{
	return arena_chunk_of(&f->arena, f->pieces[i].place);
}

/* Nothing is allocated from an isolated chunk; frees go on, and the last one returns it. */
static void test_isolated_chunk(void **state)
{
	static struct fixture f;
	uint64_t seed = 9;
	uint32_t chunk;

	(void)state;
	open_arena(&f, 65536, 0);
	for (int i = 0; i < 1000; i++)
		churn(&f, &seed, 200);
	chunk = chunk_of_piece(&f, 0);
	assert_int_equal(arena_isolate(&f.arena, chunk), 0);
	assert_arena_sound(&f);
	for (uint32_t before = f.nr; f.nr < before + 60;)
		assert_int_not_equal(chunk_of_piece(&f, alloc(&f, 200)), chunk);
	for (uint32_t i = f.nr; i-- > 0;) {
		if (chunk_of_piece(&f, i) == chunk && i % 2)
			assert_int_equal(drop(&f, i), 0);
		assert_arena_sound(&f);
	}
	arena_unisolate(&f.arena, chunk);
	assert_arena_sound(&f);
	assert_int_equal(arena_isolate(&f.arena, chunk), 0);
	for (uint32_t i = f.nr; i-- > 0;)
		if (chunk_of_piece(&f, i) == chunk)
			assert_int_equal(drop(&f, i), 0);
	assert_int_not_equal(f.arena.region->chunks[chunk].state, CHUNK_USED);
	assert_arena_sound(&f);
	while (f.nr)
		assert_int_equal(drop(&f, 0), 0);
	assert_empty(&f);
	close_arena(&f);
}

/* A chunk that lost OS pages takes no block until it has been emptied; then it is as new. */
static void test_punched_chunk(void **state)
{
	static struct fixture f;
	uint32_t chunk, kept;

	(void)state;
	open_arena(&f, 65536, 0);
	for (int i = 0; i < 12; i++)
		alloc(&f, PAGE_BYTES);
	chunk = chunk_of_piece(&f, 0);
	while (f.nr > 2)
		drop(&f, f.nr - 1);
	kept = f.nr;
	assert_int_equal(arena_isolate(&f.arena, chunk), 0);
	arena_mark_punched(&f.arena, chunk, 5);
	region_punch(f.arena.region, chunk * 65536ULL + 5 * PAGE_BYTES, 5 * PAGE_BYTES);
	arena_unisolate(&f.arena, chunk);
	assert_arena_sound(&f);
	assert_int_equal(arena_sparsest(&f.arena), chunk);
	assert_int_equal(f.arena.punched_pages, 5);
	for (int i = 0; i < 40; i++)
		assert_int_not_equal(chunk_of_piece(&f, alloc(&f, 500)), chunk);
	assert_int_equal(drop(&f, 0), 0);
	assert_arena_sound(&f);
	for (uint32_t i = f.nr; i-- > 0;)
		if (chunk_of_piece(&f, i) == chunk)
			drop(&f, i);
	assert_int_equal(kept, 2);
	assert_int_equal(f.arena.punched_pages, 0);
	assert_arena_sound(&f);
	for (int i = 0; i < 200; i++)
		alloc(&f, 3000);
	assert_arena_sound(&f);
	while (f.nr)
		drop(&f, 0);
	assert_empty(&f);
	close_arena(&f);
}

/* The sparsest chunk is the one with the fewest live words, as exactly as the lists are. */
static void test_sparsest_chunk(void **state)
{
	static struct fixture f;
	struct region *region;
	uint64_t seed = 4;

	(void)state;
	open_arena(&f, 65536, 0);
	region = f.arena.region;
	assert_int_equal(arena_sparsest(&f.arena), CHUNK_NONE);
	for (int i = 0; i < 3000; i++) {
		uint32_t c, fewest = UINT32_MAX;

		churn(&f, &seed, 300);
		if (!f.arena.nr_chunks)
			continue;
		for (c = 0; c < region_nr_touched(region); c++)
			if (region->chunks[c].state == CHUNK_USED &&
			    region->chunks[c].live_words < fewest)
				fewest = region->chunks[c].live_words;
		c = arena_sparsest(&f.arena);
		assert_true(region->chunks[c].live_words < fewest + 65536 / 4 / ARENA_NR_OCCUPANCY);
	}
	close_arena(&f);
}

static int compare_claims(const void *a, const void *b)
{
	const struct arena_claim *x = a, *y = b;

	return (x->place > y->place) - (x->place < y->place);
}

/* From its claims alone a chunk is made again, whatever its headers were: the same blocks, all
 * else free and zero. */
static void test_rebuilt_chunk_is_the_same(void **state)
{
	static struct fixture f;

	(void)state;
	for (uint64_t seed = 1; seed < 60; seed++) {
		struct arena_claim claims[MAX_BLOCKS];
		struct region *region;
		uint64_t random = seed;
		uint32_t nr = 0;

		open_arena(&f, 65536, 0);
		region = f.arena.region;
		for (int i = 0; i < 300; i++)
			churn(&f, &random, 40);
		for (uint32_t i = f.nr; i-- > 0;)
			if (chunk_of_piece(&f, i) != 0)
				drop(&f, i);
		if (!f.nr) {
			close_arena(&f);
			continue;
		}
		for (uint32_t i = 0; i < f.nr; i++) {
			struct block *block = block_at(&f.arena, f.pieces[i].place);

			claims[nr++] = (struct arena_claim){f.pieces[i].place, f.pieces[i].bytes,
							    block->tag.owner};
			block->size = block->prev = 0xffff;
		}
		qsort(claims, nr, sizeof(*claims), compare_claims);
		for (uint32_t i = 0; i < nr; i++) { /* noise where nothing is claimed */
			uint64_t at = claims[i].place + arena_words(claims[i].bytes);
			uint64_t end = i + 1 < nr ? claims[i + 1].place : region->chunk_words;

			memset(region->arena + at, 0xee, (end - at) * 4);
		}
		memset(region->arena, 0xee, claims[0].place * 4);
		arena_fini(&f.arena);
		arena_init(&f.arena, region);
		arena_rebuild_chunk(&f.arena, 0, claims, nr);
		assert_arena_sound(&f);
		while (f.nr)
			assert_int_equal(drop(&f, 0), 0);
		assert_arena_sound(&f);
		assert_int_equal(f.arena.nr_chunks, 0);
		close_arena(&f);
	}
}

/* Blocks of all neighbourhoods: first, last, before and behind free ones, in lists of one, of
 * several. Deterministic, so that each flip is tried on the same arena. */
static void make_neighbourhoods(struct fixture *f)
{
	static const uint32_t sizes[] = {300, 1, 300, 40, 300, 900, 4096, 300, 2000, 40, 900, 300};

	for (int round = 0; round < 2; round++)
		for (size_t i = 0; i < ARRAY_SIZE(sizes); i++)
			alloc(f, sizes[i]);
	while (chunk_of_piece(f, alloc(f, 3000)) == 0)
		;
	for (uint32_t i = 22; i > 0; i -= 2)
		drop(f, i);
}

/* Places of all blocks of chunk 0. */
static uint32_t list_blocks(const struct fixture *f, struct arena_block *blocks)
{
	struct arena_block b = {.place = 0};
	uint32_t nr = 0;

	for (; arena_walk(&f->arena, 0, &b) > 0; b.place += b.words)
		blocks[nr++] = b;
	return nr;
}

static void mark_damaged(struct fixture *f, uint64_t place)
{
	for (uint32_t i = 0; i < f->nr; i++)
		f->pieces[i].is_damaged |= f->pieces[i].place == place;
}

static void assert_unused_chunks_zero(struct region *region)
{
	static const uint8_t zeroes[65536];

	pthread_mutex_lock(&region->keeping);
	for (uint32_t c = 0; c < region_nr_touched(region); c++)
		if (region->chunks[c].state != CHUNK_USED)
			assert_memory_equal(region->arena + c * 16384, zeroes, 65536);
	pthread_mutex_unlock(&region->keeping);
}

/* After damage: use the arena in every way, and see that no other block's content changes. */
static void use_damaged_arena(struct fixture *f, uint64_t seed)
{
	char message[160];

	arena_check(&f->arena, message);
	for (int i = 0; i < 60; i++) {
		if (f->nr && random_below(&seed, 2)) {
			drop(f, (uint32_t)random_below(&seed, f->nr));
		} else {
			static const uint32_t sizes[] = {1, 40, 300, 280, 900, 2000, 4096};

			alloc(f, sizes[random_below(&seed, ARRAY_SIZE(sizes))]);
		}
		if (i % 20 == 10 && f->arena.region->chunks[0].state == CHUNK_USED &&
		    !f->arena.region->chunks[0].flags && arena_isolate(&f->arena, 0) == 0)
			arena_unisolate(&f->arena, 0);
		for (uint32_t p = 0; p < f->nr; p++)
			assert_piece_intact(f, &f->pieces[p]);
	}
	arena_check(&f->arena, message);
	while (f->nr)
		drop(f, f->nr - 1);
	arena_check(&f->arena, message);
	assert_unused_chunks_zero(f->arena.region);
}

/* Any one bit of any header flipped, allocated or free, links included: memory may be lost until
 * the next rebuild, but nothing crashes and no other block's content changes. */
static void test_flipped_header_bits_do_not_spread(void **state)
{
	static struct fixture f;
	struct arena_block blocks[128];
	uint32_t nr;

	(void)state;
	open_arena(&f, 65536, 0);
	make_neighbourhoods(&f);
	nr = list_blocks(&f, blocks);
	close_arena(&f);
	assert_true(nr > 24);
	for (uint32_t b = 0; b < nr; b++) {
		uint32_t bits = blocks[b].is_free ? 128 : 32; /* tags are the store's */

		for (uint32_t bit = 0; bit < bits; bit++) {
			uint8_t *header;

			open_arena(&f, 65536, 0);
			make_neighbourhoods(&f);
			header = (uint8_t *)block_at(&f.arena, blocks[b].place);
			mark_damaged(&f, blocks[b].place);
			header[bit / 8] ^= (uint8_t)(1 << bit % 8);
			use_damaged_arena(&f, b * 128 + bit);
			close_arena(&f);
		}
	}
}

/* Whole headers of noise. */
static void test_noise_in_headers_does_not_spread(void **state)
{
	static struct fixture f;
	uint64_t seed = 77;

	(void)state;
	for (int i = 0; i < 300; i++) {
		struct arena_block blocks[128], *b;
		uint32_t nr;

		open_arena(&f, 65536, 0);
		make_neighbourhoods(&f);
		nr = list_blocks(&f, blocks);
		b = &blocks[random_below(&seed, nr)];
		mark_damaged(&f, b->place);
		fill_random(block_at(&f.arena, b->place), b->is_free ? 16 : 4, &seed);
		use_damaged_arena(&f, seed);
		close_arena(&f);
	}
}

/* arena_check() notices any one flipped bit of size, prev and links, and of what is free. */
static void test_check_finds_flipped_bits(void **state)
{
	static struct fixture f;
	struct arena_block blocks[128];
	char message[160];
	uint32_t nr;

	(void)state;
	open_arena(&f, 65536, 0);
	make_neighbourhoods(&f);
	assert_arena_sound(&f);
	nr = list_blocks(&f, blocks);
	for (uint32_t b = 0; b < nr; b++) {
		uint32_t bits = blocks[b].is_free ? blocks[b].words * 32 : 32;
		uint8_t *bytes = (uint8_t *)block_at(&f.arena, blocks[b].place);

		for (uint32_t bit = 0; bit < bits; bit += bit < 128 ? 1 : 101) {
			bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
			assert_that(arena_check(&f.arena, message) == -EUCLEAN,
				    "bit %u of block %u was not noticed", bit, b);
			assert_true(strlen(message) > 10 && strlen(message) < 160);
			bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
		}
	}
	assert_arena_sound(&f);
	close_arena(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_every_size),
		cmocka_unit_test(test_best_fit),
		cmocka_unit_test(test_neighbours_merge_in_any_order),
		cmocka_unit_test(test_small_rests_are_not_lost),
		cmocka_unit_test(test_random_histories),
		cmocka_unit_test(test_limit),
		cmocka_unit_test(test_wrong_places_are_not_freed),
		cmocka_unit_test(test_holds_needs_a_block_of_that_length),
		cmocka_unit_test(test_isolated_chunk),
		cmocka_unit_test(test_punched_chunk),
		cmocka_unit_test(test_sparsest_chunk),
		cmocka_unit_test(test_rebuilt_chunk_is_the_same),
		cmocka_unit_test(test_flipped_header_bits_do_not_spread),
		cmocka_unit_test(test_noise_in_headers_does_not_spread),
		cmocka_unit_test(test_check_finds_flipped_bits),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
