/* SPDX-License-Identifier: MIT
 *
 * Bits flipped in slots, words, headers and payloads: the page's right content or EIO, no crash,
 * and no other page is touched. Afterwards the store goes on, and store_rebuild() mends it.
 */
#include "fixture.h"
#include "block.h"

#define NR_PAGES 40

static const uint32_t chunk_sizes[] = {4096, 65536};

static uint8_t buffer[PAGE_BYTES];

struct scene {
	int fd;
	struct store *store;
	uint8_t want[NR_PAGES][PAGE_BYTES];
};

static void scene_write(struct scene *s, uint64_t i, enum page_kind kind, uint64_t seed)
{
	make_page(s->want[i], kind, seed);
	assert_int_equal(store_write(s->store, i, 1, s->want[i]), 1);
}

static void scene_open(struct scene *s, uint32_t chunk_bytes)
{
	s->fd = open_memory();
	s->store = open_store(s->fd, NR_PAGES, chunk_bytes, 0, 128 * KIB);
	memset(s->want, 0, sizeof(s->want));
	for (uint64_t i = 0; i < NR_PAGES; i++)
		scene_write(s, i, (enum page_kind)(i % NR_PAGE_KINDS), i);
	for (uint64_t i = 3; i < NR_PAGES; i += 5) { /* holes between blocks; empty slots */
		assert_int_equal(store_discard(s->store, i, 1), 1);
		memset(s->want[i], 0, PAGE_BYTES);
	}
	for (uint64_t i = 2; i < NR_PAGES;
	     i += 8) /* from one place in the word table to the other */
		scene_write(s, i, PAGE_WORD_64, 100 + i);
}

static void scene_close(struct scene *s)
{
	store_destroy(s->store);
	close(s->fd);
}

static uint64_t word_of(const struct scene *s, uint64_t i)
{
	return atomic_load(&s->store->region->slots[i]);
}

/* All pages but @except have their content. */
static void assert_others(struct scene *s, uint64_t except)
{
	for (uint64_t i = 0; i < NR_PAGES; i++) {
		if (i == except)
			continue;
		assert_that(store_read(s->store, i, 1, buffer) == 1, "page %llu is lost, too",
			    (unsigned long long)i);
		assert_memory_equal(buffer, s->want[i], PAGE_BYTES);
	}
}

/* A bit somewhere, and the page that it belongs to. */
struct bit {
	uint8_t *byte;
	uint8_t mask;
	uint64_t page;
	bool is_lock;
};

static void flip(const struct bit *bit)
{
	*bit->byte ^= bit->mask;
}

struct part {
	void *bytes;
	uint32_t nr;
};

/* Part @n of what is kept of page @i: slot, repeated word or tag, payload, header. */
static struct part part_of(struct scene *s, uint64_t i, uint32_t n)
{
	struct region *region = s->store->region;
	struct arena *arena = &s->store->arena;
	uint64_t word = word_of(s, i);
	void *payload, *block;

	if (n == 0)
		return (struct part){&region->slots[i], 8};
	if (n == 1 && slot_has_word(word))
		return (struct part){(void *)&region->words[slot_word_at(i, slot_state(word))], 8};
	if (!slot_has_block(word))
		return (struct part){NULL, 0};
	payload = arena_payload(arena, store_place(s->store, word));
	block = block_at(arena, store_place(s->store, word));
	if (n == 1)
		return (struct part){arena_tag(arena, store_place(s->store, word)), 8};
	if (n == 2)
		return (struct part){payload, slot_length(word)};
	return (struct part){block, payload == block ? 0 : 4};
}

/* Calls @each for each bit that is kept of page @i, or each @step-th of long payloads. Where the
 * page is may change from one to the next. */
static void for_each_bit(struct scene *s, uint64_t i, uint32_t step,
			 void (*each)(struct scene *, struct bit *))
{
	for (uint32_t n = 0; n < 4; n++) {
		struct part part = part_of(s, i, n);

		for (uint32_t b = 0; b<part.nr * 8; b += part.nr> 64 ? step : 1) {
			struct bit bit = {.page = i,
					  .mask = (uint8_t)(1 << b % 8),
					  .is_lock = n == 0 && 1ULL << b == SLOT_LOCK};

			part = part_of(s, i, n);
			bit.byte = (uint8_t *)part.bytes + b / 8;
			each(s, &bit);
		}
	}
}

static void for_each_page(uint32_t step, void (*each)(struct scene *, struct bit *))
{
	for (size_t c = 0; c < ARRAY_SIZE(chunk_sizes); c++) {
		static struct scene s;

		scene_open(&s, chunk_sizes[c]);
		for (uint64_t i = 0; i < 2 * NR_PAGE_KINDS; i++)
			for_each_bit(&s, i, step, each);
		assert_sound(s.store);
		assert_others(&s, NR_PAGES);
		scene_close(&s);
	}
}

static void read_flipped(struct scene *s, struct bit *bit)
{
	uint64_t failed = stats_of(s->store).failed_reads;
	char message[160];
	int64_t rv;

	if (bit->is_lock)
		return;
	flip(bit);
	rv = store_read(s->store, bit->page, 1, buffer);
	if (rv == 1) {
		assert_memory_equal(buffer, s->want[bit->page], PAGE_BYTES);
	} else {
		assert_int_equal(rv, -EIO);
		assert_int_equal(stats_of(s->store).failed_reads, failed + 1);
		assert_int_equal(store_check(s->store, message), -EUCLEAN);
		assert_int_equal(store_pread(s->store, bit->page * PAGE_BYTES + 1, 5, buffer),
				 -EIO);
		assert_int_equal(store_pwrite(s->store, bit->page * PAGE_BYTES + 1, 5, buffer),
				 -EIO);
		assert_int_equal(store_punch(s->store, bit->page * PAGE_BYTES + 1, 5), -EIO);
	}
	flip(bit);
	assert_int_equal(store_read(s->store, bit->page, 1, buffer), 1);
	assert_memory_equal(buffer, s->want[bit->page], PAGE_BYTES);
}

/* A page with a flipped bit is EIO, counted and found by check, or has its right content. */
static void test_flipped_bits_are_never_content(void **state)
{
	(void)state;
	for_each_page(37, read_flipped);
}

/*
 * Flipped state bits lead to another kind of slot, whose check is of something else: by chance one
 * in 256 has it. Enough pages of each kind to meet that many times.
 */
static void test_flipped_states_are_never_content(void **state)
{
	enum { NR = 20000 };
	struct store_options options = {
		.nr_pages = NR, .reserve_bytes = 1 << 20, .chunk_bytes = STORE_MAX_CHUNK_BYTES};
	static uint64_t page[PAGE_BYTES / 8], got[PAGE_BYTES / 8];
	struct store *store;
	uint32_t flags;
	int fd = region_memory(&flags);

	(void)state;
	assert_int_equal(store_create(&store, fd, &options), 0);
	for (uint64_t i = 0; i < NR; i++) {
		slot_t *slot = &store->region->slots[i];

		/* A wide word, a narrow one, noise, and what compresses. */
		for (uint32_t n = 0; n < PAGE_BYTES / 8; n++)
			page[n] = (i * 1000 + (i % 4 < 2    ? 0
					       : i % 4 == 2 ? n
							    : n % 99)) *
					  0x9e3779b97f4a7c15ULL >>
				  (i % 4 == 1 ? 40 : 0);
		assert_int_equal(store_write(store, i, 1, page), 1);
		for (uint64_t bits = 1; bits <= SLOT_STATE_MASK; bits++) {
			int64_t rv;

			atomic_fetch_xor(slot, bits);
			rv = store_read(store, i, 1, got);
			atomic_fetch_xor(slot, bits);
			if (rv == 1)
				assert_memory_equal(got, page, PAGE_BYTES);
			else
				assert_int_equal(rv, -EIO);
		}
		assert_int_equal(store_read(store, i, 1, got), 1);
		assert_memory_equal(got, page, PAGE_BYTES);
	}
	store_destroy(store);
	close(fd);
}

/* Put back what was there before, by rebuild and a fresh write. */
static void mend(struct scene *s, uint64_t page, const uint8_t *content)
{
	assert_true(store_rebuild(s->store) >= 0);
	assert_others(s, page);
	memcpy(s->want[page], content, PAGE_BYTES);
	assert_int_equal(store_write(s->store, page, 1, content), 1);
	assert_int_equal(store_rebuild(s->store), 0);
	assert_sound(s->store);
}

static void discard_flipped(struct scene *s, struct bit *bit)
{
	uint8_t content[PAGE_BYTES];

	if (bit->is_lock)
		return;
	memcpy(content, s->want[bit->page], PAGE_BYTES);
	flip(bit);
	assert_true(store_discard(s->store, bit->page, 1) >= 0);
	assert_int_equal(store_read(s->store, bit->page, 1, buffer), 1);
	make_page(s->want[bit->page], PAGE_ZERO, 0);
	assert_memory_equal(buffer, s->want[bit->page], PAGE_BYTES);
	assert_others(s, bit->page);
	mend(s, bit->page, content);
}

/* A damaged page can be discarded; all others stay, and after a rebuild all is sound. */
static void test_damaged_pages_can_be_discarded(void **state)
{
	(void)state;
	for_each_page(1009, discard_flipped);
}

static void overwrite_flipped(struct scene *s, struct bit *bit)
{
	uint8_t content[PAGE_BYTES];

	if (bit->is_lock)
		return;
	memcpy(content, s->want[bit->page], PAGE_BYTES);
	flip(bit);
	scene_write(s, bit->page, PAGE_TEXT, 77);
	assert_others(s, NR_PAGES);
	store_compact(s->store, UINT64_MAX);
	assert_others(s, NR_PAGES);
	mend(s, bit->page, content);
}

/* A damaged page can be overwritten, and what was compacted after it is whole. */
static void test_damaged_pages_can_be_overwritten(void **state)
{
	(void)state;
	for_each_page(1009, overwrite_flipped);
}

static void rebuild_flipped(struct scene *s, struct bit *bit)
{
	uint8_t content[PAGE_BYTES];
	int64_t rv;

	memcpy(content, s->want[bit->page], PAGE_BYTES);
	flip(bit);
	store_destroy(s->store);
	assert_int_equal(store_adopt(&s->store, s->fd), 0);
	assert_others(s, bit->page);
	rv = store_read(s->store, bit->page, 1, buffer);
	if (rv == 1)
		assert_memory_equal(buffer, content, PAGE_BYTES);
	else
		assert_int_equal(rv, -EIO);
	assert_true(store_discard(s->store, bit->page, 1) >= 0);
	assert_int_equal(store_rebuild(s->store), 0);
	assert_sound(s->store);
	mend(s, bit->page, content);
}

/* Damage met by a rebuild costs that page at the most. */
static void test_rebuild_survives_damage(void **state)
{
	(void)state;
	for_each_page(1009, rebuild_flipped);
}

/* Noise over many slots and blocks: no crash, no wrong content; after a rebuild and discards all
 * memory is back. */
static void test_noise_is_survived(void **state)
{
	uint64_t seed = 11;

	(void)state;
	for (int round = 0; round < 200; round++) {
		static struct scene s;
		struct region *region;

		scene_open(&s, chunk_sizes[round % 2]);
		region = s.store->region;
		for (uint64_t n = random_below(&seed, 12); n > 0; n--) {
			uint64_t i = random_below(&seed, NR_PAGES);
			uint64_t noise = next_random(&seed);

			switch (random_below(&seed, 4)) {
			case 0: /* as many bits as the check is sure to find */
				noise = 1ULL << noise % 64 | 1ULL << noise / 64 % 64 |
					1ULL << noise / 4096 % 64;
				atomic_store(&region->slots[n],
					     word_of(&s, n) ^ (noise & ~SLOT_LOCK));
				break;
			case 1: /* two slots with one block */
				if (slot_has_block(word_of(&s, i)))
					atomic_store(&region->slots[n], word_of(&s, i));
				break;
			case 2:
				region->arena[random_below(&seed, 20000)] ^= (uint32_t)noise;
				break;
			default:
				fill_random(region->arena + random_below(&seed, 20000), 40, &seed);
			}
		}
		for (uint64_t step = 0; step < 100; step++) {
			uint64_t i = random_below(&seed, NR_PAGES);
			char message[160];

			if (store_read(s.store, i, 1, buffer) == 1)
				assert_memory_equal(buffer, s.want[i], PAGE_BYTES);
			if (step % 8 == 1)
				store_compact(s.store, UINT64_MAX);
			if (step % 8 == 3)
				store_check(s.store, message);
			if (step % 8 == 5)
				scene_write(&s, i, PAGE_TEXT, step);
			if (step % 8 == 7) {
				assert_true(store_discard(s.store, i, 1) >= 0);
				memset(s.want[i], 0, PAGE_BYTES);
			}
			if (step == 70)
				assert_true(store_rebuild(s.store) >= 0);
		}
		assert_true(store_discard(s.store, 0, NR_PAGES) >= 0);
		assert_int_equal(store_rebuild(s.store), 0);
		region_settle(region);
		assert_sound(s.store);
		assert_int_equal(stats_of(s.store).mem_used_bytes, 0);
		scene_close(&s);
	}
}

/* A stale block, or another page's, is not read, however whole it is. */
static void test_other_blocks_are_not_mistaken(void **state)
{
	static struct scene s;
	uint64_t a, b;

	(void)state;
	scene_open(&s, 65536);
	scene_write(&s, 10, PAGE_RANDOM, 1);
	scene_write(&s, 11, PAGE_RANDOM, 1);
	a = word_of(&s, 10);
	b = word_of(&s, 11);
	atomic_store(&s.store->region->slots[10], b);
	assert_int_equal(store_read(s.store, 10, 1, buffer), -EIO);
	/* Even with the tag and the check forged: the checksum knows the page. */
	arena_tag(&s.store->arena, store_place(s.store, b))->owner = 10;
	assert_int_equal(store_read(s.store, 10, 1, buffer), -EIO);
	arena_tag(&s.store->arena, store_place(s.store, b))->owner = 11;
	atomic_store(&s.store->region->slots[10], a);
	/* An earlier write of the same page, left at its place. */
	scene_write(&s, 10, PAGE_RANDOM, 2);
	memcpy(arena_payload(&s.store->arena, store_place(s.store, word_of(&s, 10))), s.want[11],
	       PAGE_BYTES);
	assert_int_equal(store_read(s.store, 10, 1, buffer), -EIO);
	scene_close(&s);
}

/* A page's block of an earlier write: whole, of the same length, back at its place. What tells it
 * from the right one is the slot's check and tie, 27 bits in a store of this size. */
static void test_stale_blocks_are_not_mistaken(void **state)
{
	static struct scene s;
	static uint8_t stale[BLOCK_HEADER_BYTES + PAGE_BYTES];
	uint8_t *at = NULL;
	uint32_t nr_tried = 0;

	(void)state;
	scene_open(&s, 65536);
	for (uint64_t i = 0; i < 4000; i++) {
		uint8_t *block;

		scene_write(&s, 15, PAGE_RANDOM, 1000 + i);
		block = (uint8_t *)block_at(&s.store->arena, store_place(s.store, word_of(&s, 15)));
		if (block == at) {
			uint8_t good[sizeof(stale)];

			memcpy(good, block, sizeof(good));
			memcpy(block, stale, sizeof(stale));
			assert_int_equal(store_read(s.store, 15, 1, buffer), -EIO);
			memcpy(block, good, sizeof(good));
			nr_tried++;
		}
		if (!at || block == at)
			memcpy(stale, block, sizeof(stale));
		at = at ? at : block;
	}
	assert_true(nr_tried > 1000);
	assert_sound(s.store);
	scene_close(&s);
}

/* A bit of the map of touched slots: no page is lost, none is made up, and check finds it. */
static void test_map_of_touched_slots_can_be_damaged(void **state)
{
	static struct scene s;
	struct region *region;
	char message[160];

	(void)state;
	scene_open(&s, 65536);
	region = s.store->region;
	for (int bit = 0; bit < 128; bit++) {
		_Atomic uint64_t *map = bit < 64 ? region->map : region->map_copy;

		atomic_fetch_xor(map, 1ULL << bit % 64);
		assert_others(&s, NR_PAGES);
		assert_int_equal(store_check(s.store, message), -EUCLEAN);
		if (bit % 3 == 0)
			assert_int_equal(store_rebuild(s.store), 0);
		else
			atomic_fetch_xor(map, 1ULL << bit % 64);
		assert_sound(s.store);
	}
	scene_close(&s);
}

/* A rebuild believes nothing of the chunk table: any bit of it, or all of it. */
static void test_chunk_table_is_made_again(void **state)
{
	(void)state;
	for (size_t n = 0; n < ARRAY_SIZE(chunk_sizes); n++) {
		for (uint32_t bit = 0; bit < 140; bit++) {
			static struct scene s;
			struct region *region;

			scene_open(&s, chunk_sizes[n]);
			store_destroy(s.store);
			assert_int_equal(region_map(&region, s.fd), 0);
			for (uint32_t c = 0; c < 12; c++) {
				uint8_t *entry = (uint8_t *)&region->chunks[c];
				/* Where a chunk is WHOLE next and prev are its tag. */
				bool is_tag = region->chunks[c].state == CHUNK_WHOLE;

				if (bit >= 128)
					memset(entry + (is_tag ? 8 : 0), (int)bit, is_tag ? 8 : 16);
				else if (bit >= 64 || !is_tag)
					entry[bit / 8] ^= (uint8_t)(1 << bit % 8);
			}
			region_destroy(region);
			assert_int_equal(store_adopt(&s.store, s.fd), 0);
			assert_sound(s.store);
			assert_others(&s, NR_PAGES);
			scene_close(&s);
		}
	}
}

/* Any bit of the header: nothing is lost, check finds it if it matters, and the next worker mends
 * it. */
static void test_header_can_be_damaged(void **state)
{
	static struct scene s;
	char message[160];

	(void)state;
	scene_open(&s, 65536);
	for (uint32_t bit = 0; bit < sizeof(struct region_geometry) * 2 * 8; bit++) {
		uint8_t *header = (uint8_t *)s.store->region->header;

		header[bit / 8] ^= (uint8_t)(1 << bit % 8);
		assert_others(&s, NR_PAGES);
		scene_write(&s, bit % NR_PAGES, (enum page_kind)(bit % NR_PAGE_KINDS), bit);
		assert_int_equal(stats_of(s.store).nr_pages, NR_PAGES);
		assert_int_equal(store_check(s.store, message), -EUCLEAN);
		if (bit % 16 == 7) {
			store_destroy(s.store);
			assert_int_equal(store_adopt(&s.store, s.fd), 0);
		} else {
			assert_int_equal(store_rebuild(s.store), 0);
		}
		assert_sound(s.store);
		assert_others(&s, NR_PAGES);
	}
	scene_close(&s);
}

/* Requests of all kinds, and compaction, on a store whose chunk table has @noise in one entry:
 * right content or EIO, and it ends. */
static void live_with_damage(struct scene *s, uint64_t seed)
{
	char message[160];

	for (uint64_t i = 0; i < NR_PAGES; i++) {
		uint64_t at = random_below(&seed, NR_PAGES);

		switch (random_below(&seed, 6)) {
		case 0:
			store_compact(s->store, UINT64_MAX);
			break;
		case 1:
			assert_true(store_discard(s->store, at, 1) >= 0);
			memset(s->want[at], 0, PAGE_BYTES);
			break;
		case 2:
			if (store_read(s->store, at, 1, buffer) == 1)
				assert_memory_equal(buffer, s->want[at], PAGE_BYTES);
			break;
		case 3:
			store_check(s->store, message);
			stats_of(s->store);
			break;
		default:
			scene_write(s, at, (enum page_kind)(seed % NR_PAGE_KINDS), seed);
		}
	}
	for (uint64_t i = 0; i < NR_PAGES; i++)
		if (store_read(s->store, i, 1, buffer) == 1)
			assert_memory_equal(buffer, s->want[i], PAGE_BYTES);
}

/* Any bit of the chunk table while the store works: right content or EIO; no crash, no endless
 * walk; check finds it, and a rebuild makes all sound. */
static void test_chunk_table_can_be_damaged(void **state)
{
	(void)state;
	for (size_t n = 0; n < ARRAY_SIZE(chunk_sizes); n++) {
		for (uint32_t bit = 0; bit < 8 * 128; bit++) {
			static struct scene s;
			struct region *region;
			uint8_t *entry;
			char message[160];
			bool matters;

			scene_open(&s, chunk_sizes[n]);
			region = s.store->region;
			pthread_mutex_lock(&region->keeping);
			pthread_mutex_lock(&region->lock);
			entry = (uint8_t *)&region->chunks[bit / 128];
			/* An entry's links in use, its counts, its state, its flags. */
			matters = region->chunks[bit / 128].state == CHUNK_USED;
			entry[bit % 128 / 8] ^= (uint8_t)(1 << bit % 8);
			pthread_mutex_unlock(&region->lock);
			pthread_mutex_unlock(&region->keeping);
			if (matters)
				assert_int_equal(store_check(s.store, message), -EUCLEAN);
			live_with_damage(&s, bit);
			assert_true(store_rebuild(s.store) >= 0);
			assert_true(store_discard(s.store, 0, NR_PAGES) >= 0);
			assert_int_equal(store_rebuild(s.store), 0);
			assert_sound(s.store);
			region_settle(region);
			assert_int_equal(stats_of(s.store).mem_used_bytes, 0);
			scene_close(&s);
		}
	}
}

/* Noise all over the chunk table, again and again. */
static void test_noise_in_the_chunk_table_is_survived(void **state)
{
	uint64_t seed = 5;

	(void)state;
	for (int round = 0; round < 300; round++) {
		static struct scene s;
		struct region *region;

		scene_open(&s, chunk_sizes[round % 2]);
		region = s.store->region;
		for (int n = 0; n < 4; n++) {
			uint32_t c = (uint32_t)random_below(&seed, 12);
			uint8_t *entry = (uint8_t *)&region->chunks[c];

			pthread_mutex_lock(&region->lock);
			if (n % 2)
				fill_random(entry, sizeof(struct chunk), &seed);
			else
				entry[random_below(&seed, 16)] ^= (uint8_t)next_random(&seed);
			if (region->chunks[c].state > CHUNK_KEPT)
				region->chunks[c].state %= CHUNK_KEPT + 1;
			pthread_mutex_unlock(&region->lock);
			live_with_damage(&s, seed);
		}
		assert_true(store_rebuild(s.store) >= 0);
		assert_true(store_discard(s.store, 0, NR_PAGES) >= 0);
		assert_int_equal(store_rebuild(s.store), 0);
		assert_sound(s.store);
		scene_close(&s);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_flipped_bits_are_never_content),
		cmocka_unit_test(test_flipped_states_are_never_content),
		cmocka_unit_test(test_damaged_pages_can_be_discarded),
		cmocka_unit_test(test_damaged_pages_can_be_overwritten),
		cmocka_unit_test(test_rebuild_survives_damage),
		cmocka_unit_test(test_noise_is_survived),
		cmocka_unit_test(test_map_of_touched_slots_can_be_damaged),
		cmocka_unit_test(test_chunk_table_is_made_again),
		cmocka_unit_test(test_header_can_be_damaged),
		cmocka_unit_test(test_chunk_table_can_be_damaged),
		cmocka_unit_test(test_noise_in_the_chunk_table_is_survived),
		cmocka_unit_test(test_stale_blocks_are_not_mistaken),
		cmocka_unit_test(test_other_blocks_are_not_mistaken),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
