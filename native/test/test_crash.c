/* SPDX-License-Identifier: MIT
 *
 * Killed at any step: the region is copied at each basic block of a request or of compaction, and
 * adopted there, as the next worker would. Each page is the old content or the new one, nothing
 * is lost, nothing is owned twice, and the copy goes on working.
 */
#include "fixture.h"
#include "crash_points.h"

#define NR_PAGES 64

struct scene {
	int fd, copy_fd;
	struct store *store;
	struct store_options options;
	uint8_t old[NR_PAGES][PAGE_BYTES];
	uint8_t new[NR_PAGES][PAGE_BYTES];
	uint64_t nr_new; /* pages found with new content, in all copies */
	uint64_t nr_copies;
	uint64_t stride, phase; /* copies are made at each stride-th step, beginning with phase */
};

static uint8_t buffer[NR_PAGES * PAGE_BYTES];

/* Copying what other threads write is a race, and meant to be. */
#if defined(__SANITIZE_THREAD__)
#define COPIES_ARE_RACES 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define COPIES_ARE_RACES 1
#endif
#endif

static void scene_open(struct scene *s, uint32_t chunk_bytes, uint64_t mem_limit)
{
#ifdef COPIES_ARE_RACES
	skip();
#endif
	memset(s, 0, sizeof(*s));
	s->options = (struct store_options){.nr_pages = NR_PAGES,
					    .mem_limit = mem_limit,
					    .reserve_bytes = 2 * chunk_bytes,
					    .chunk_bytes = chunk_bytes};
	s->fd = open_memory();
	s->copy_fd = open_memory();
	assert_int_equal(store_create(&s->store, s->fd, &s->options), 0);
}

static void scene_close(struct scene *s)
{
	store_destroy(s->store);
	close(s->fd);
	close(s->copy_fd);
}

static void scene_write(struct scene *s, uint64_t i, enum page_kind kind, uint64_t seed)
{
	make_page(s->old[i], kind, seed);
	assert_int_equal(store_write(s->store, i, 1, s->old[i]), 1);
}

/* What the keeper is doing meanwhile is not what a rebuild looks at. */
static void copy_region(struct scene *s)
{
	const struct region *region = s->store->region;
	const struct region_geometry *h = &region->geometry;
	uint64_t chunks = (uint64_t)region_nr_touched(region) * h->chunk_bytes;

	assert_int_equal(ftruncate(s->copy_fd, (off_t)(h->arena_off + chunks)), 0);
	assert_int_equal(ftruncate(s->copy_fd, (off_t)h->total_bytes), 0);
	assert_int_equal(pwrite(s->copy_fd, region->header, h->arena_off, 0), h->arena_off);
	assert_int_equal(pwrite(s->copy_fd, region->arena, chunks, (off_t)h->arena_off), chunks);
}

static void assert_old_or_new(struct scene *s, struct store *copy)
{
	assert_int_equal(store_read(copy, 0, NR_PAGES, buffer), NR_PAGES);
	for (uint64_t i = 0; i < NR_PAGES; i++) {
		const uint8_t *page = buffer + i * PAGE_BYTES;

		if (!memcmp(page, s->old[i], PAGE_BYTES))
			continue;
		assert_that(!memcmp(page, s->new[i], PAGE_BYTES),
			    "step %llu: page %llu is neither old nor new",
			    (unsigned long long)nr_crash_points, (unsigned long long)i);
		s->nr_new++;
	}
}

/* The word table holds what slots name, and nothing else. */
static void assert_words_named(const struct store *store)
{
	for (uint64_t at = 0; at < 2 * NR_PAGES; at++) {
		uint64_t word = store->region->slots[at / 2];

		if (!slot_has_word(word) || slot_word_at(at / 2, slot_state(word)) != at)
			assert_int_equal(store->region->words[at], 0);
	}
}

/* The worker dies here. */
static void die(void *arg)
{
	struct scene *s = arg;
	struct store *copy;

	if (nr_crash_points % s->stride != s->phase % s->stride)
		return;
	s->nr_copies++;
	copy_region(s);
	assert_int_equal(store_adopt(&copy, s->copy_fd), 0);
	assert_sound(copy);
	assert_old_or_new(s, copy);
	assert_words_named(copy);
	if (s->nr_copies % 4 == 0) {
		store_compact(copy, UINT64_MAX);
		assert_true(store_discard(copy, 0, NR_PAGES) >= 0);
		region_settle(copy->region);
		assert_sound(copy);
		assert_int_equal(stats_of(copy).mem_used_bytes, 0);
	}
	store_destroy(copy);
}

/* What is changed in s->new from here on may be found after a crash. */
static void prepare(struct scene *s, uint64_t stride, uint64_t phase)
{
	memcpy(s->new, s->old, sizeof(s->old));
	s->stride = stride;
	s->phase = phase;
	s->nr_new = 0;
}

static void begin(struct scene *s, uint32_t repeats)
{
	watch_crash_points(die, s, repeats);
}

/* Returns whether there were steps: without the compiler's calls nothing is tested. */
static bool end(struct scene *s)
{
	crash_point = NULL;
	memcpy(s->old, s->new, sizeof(s->old));
	return nr_crash_points > 0;
}

/* Each kind of page over each other: killed anywhere, it is the one or the other. */
static void write_over(uint32_t chunk_bytes)
{
	static struct scene s;

	scene_open(&s, chunk_bytes, 0);
	for (uint64_t i = 0; i < NR_PAGES; i++)
		scene_write(&s, i, (enum page_kind)(i % NR_PAGE_KINDS), i);
	for (uint64_t i = 0; i < NR_PAGE_KINDS * NR_PAGE_KINDS; i++) {
		prepare(&s, 16, i);
		make_page(s.new[i], (enum page_kind)(i / NR_PAGE_KINDS), 100 + i);
		begin(&s, 3);
		store_write(s.store, i, 1, s.new[i]);
		if (!end(&s))
			skip();
	}
	assert_sound(s.store);
	scene_close(&s);
}

static void test_killed_while_writing(void **state)
{
	(void)state;
	write_over(16384);
	write_over(4096);
}

/* A batch: any page of it may be old or new. */
static void test_killed_while_writing_many(void **state)
{
	static struct scene s;

	(void)state;
	scene_open(&s, 16384, 0);
	for (uint64_t i = 0; i < NR_PAGES; i++)
		scene_write(&s, i, (enum page_kind)(i % NR_PAGE_KINDS), i);
	prepare(&s, 7, 0);
	for (uint64_t i = 5; i < 55; i++)
		make_page(s.new[i], (enum page_kind)(i * 3 % NR_PAGE_KINDS), 100 + i);
	begin(&s, 6);
	assert_int_equal(store_write(s.store, 5, 50, s.new[5]), 50);
	if (!end(&s))
		skip();
	assert_true(s.nr_new > 50);
	assert_sound(s.store);
	scene_close(&s);
}

/* Partial writes and punches: a page is whole before and after. */
static void test_killed_while_changing_parts(void **state)
{
	static struct scene s;

	(void)state;
	scene_open(&s, 65536, 0);
	for (uint64_t i = 0; i < NR_PAGES; i++)
		scene_write(&s, i, (enum page_kind)(i % NR_PAGE_KINDS), i);
	for (uint64_t i = 0; i + 3 < 24; i += 3) {
		uint8_t *at;

		prepare(&s, 23, i);
		at = s.new[i] + 1000;
		fill_random(at, 2 * PAGE_BYTES, &(uint64_t){i});
		begin(&s, 6);
		assert_int_equal(store_pwrite(s.store, i * PAGE_BYTES + 1000, 2 * PAGE_BYTES, at),
				 2 * PAGE_BYTES);
		if (!end(&s))
			skip();
		prepare(&s, 23, i);
		memset(s.new[i] + 500, 0, 2 * PAGE_BYTES);
		begin(&s, 6);
		assert_int_equal(store_punch(s.store, i * PAGE_BYTES + 500, 2 * PAGE_BYTES), 0);
		end(&s);
	}
	assert_sound(s.store);
	scene_close(&s);
}

/* Discards: a page is there or gone. */
static void test_killed_while_discarding(void **state)
{
	(void)state;
	for (uint32_t chunk = 4096; chunk <= 65536; chunk *= 16) {
		static struct scene s;

		scene_open(&s, chunk, 0);
		for (uint64_t i = 0; i < NR_PAGES; i++)
			scene_write(&s, i, (enum page_kind)(i % NR_PAGE_KINDS), i);
		prepare(&s, 5, 0);
		memset(s.new[3], 0, 45 * PAGE_BYTES);
		begin(&s, 6);
		assert_true(store_discard(s.store, 3, 45) > 0);
		if (!end(&s))
			skip();
		assert_true(s.nr_new > 0);
		scene_close(&s);
	}
}

/* Compaction changes no page, wherever it ends; also at the limit, where chunks are scarce. */
static void compact_scene(uint32_t chunk_bytes, uint64_t mem_limit, enum page_kind kind)
{
	static struct scene s;

	scene_open(&s, chunk_bytes, mem_limit);
	for (int round = 0; round < 2; round++) {
		for (uint64_t i = 0; i < NR_PAGES; i++) {
			make_page(buffer, kind, i + 100 * (uint64_t)round);
			if (store_write(s.store, i, 1, buffer) == 1)
				memcpy(s.old[i], buffer, PAGE_BYTES);
		}
		for (uint64_t i = 0; i < NR_PAGES; i++) {
			if (i % 4 == 1)
				continue;
			assert_true(store_discard(s.store, i, 1) >= 0);
			memset(s.old[i], 0, PAGE_BYTES);
		}
	}
	prepare(&s, 8, 0);
	begin(&s, 6);
	store_compact(s.store, UINT64_MAX);
	if (!end(&s))
		skip();
	assert_int_equal(s.nr_new, 0);
	assert_sound(s.store);
	scene_close(&s);
}

static void test_killed_while_compacting(void **state)
{
	(void)state;
	compact_scene(65536, 0, PAGE_TEXT);
	compact_scene(16384, 0, PAGE_TEXT);
	compact_scene(8192, 0, PAGE_RANDOM);
	compact_scene(4096, 0, PAGE_SPARSE);
	compact_scene(16384, 128 * KIB, PAGE_RANDOM);
	compact_scene(65536, 128 * KIB, PAGE_TEXT);
}

/* A rebuild that is itself killed is done again. */
static void test_killed_while_rebuilding(void **state)
{
	static struct scene s;

	(void)state;
	scene_open(&s, 16384, 0);
	for (uint64_t i = 0; i < NR_PAGES; i++)
		scene_write(&s, i, (enum page_kind)(i % NR_PAGE_KINDS), i);
	assert_true(store_discard(s.store, 20, 9) > 0);
	memset(s.old[20], 0, 9 * PAGE_BYTES);
	prepare(&s, 7, 0);
	begin(&s, 6);
	assert_int_equal(store_rebuild(s.store), 0);
	if (!end(&s))
		skip();
	assert_int_equal(s.nr_new, 0);
	assert_sound(s.store);
	scene_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_killed_while_writing),
		cmocka_unit_test(test_killed_while_writing_many),
		cmocka_unit_test(test_killed_while_changing_parts),
		cmocka_unit_test(test_killed_while_discarding),
		cmocka_unit_test(test_killed_while_compacting),
		cmocka_unit_test(test_killed_while_rebuilding),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
