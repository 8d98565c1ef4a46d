/* SPDX-License-Identifier: MIT
 *
 * Several threads in one store: whole pages that all of them write, parts of pages that each has
 * its own of, reads, discards, statistics and compaction. Every page says what it ought to hold.
 * For the thread sanitizer, too.
 */
#include "fixture.h"

#include <pthread.h>
#include <sys/eventfd.h>

#define NR_SHARED 300 /* pages from 0 that all threads write whole */
#define NR_PARTED 16  /* pages behind them, written in cells */
#define CELL_BYTES 64
#define NR_CELLS (PAGE_BYTES / CELL_BYTES)
#define NR_WORKERS 4
#define BURST 12

struct scene {
	struct store *store;
	struct store_options options;
	int nr_steps;
	_Atomic bool stop;
	_Atomic uint64_t nr_refused, nr_held; /* pages that discards gave up */
};

struct worker {
	struct scene *scene;
	uint32_t number;
	uint64_t seed;
	pthread_t thread;
};

/* A page that says which it is: first its number and a seed, from which all the rest follows; a
 * same-filled one has both in its word. */
static void make_labelled(uint8_t *page, uint64_t index, uint64_t seed)
{
	enum page_kind kind = (enum page_kind)(seed % NR_PAGE_KINDS);
	uint64_t label[2] = {index, seed};

	if (kind == PAGE_WORD_50 || kind == PAGE_WORD_64 || kind == PAGE_ZERO) {
		fill_word(page, index | (seed & 0xfff) << 16 |
					(kind == PAGE_WORD_64 ? 3ULL << 60 : 1ULL << 40));
		return;
	}
	make_page(page, kind, seed);
	memcpy(page, label, sizeof(label));
}

static void assert_labelled(const uint8_t *page, uint64_t index)
{
	static _Thread_local uint8_t want[PAGE_BYTES];
	uint64_t label[2];

	memcpy(label, page, sizeof(label));
	if (label[0] == 0 && label[1] == 0) {
		memset(want, 0, PAGE_BYTES); /* never written, or discarded; or page 0 */
		assert_memory_equal(page, want, PAGE_BYTES);
	} else if (label[0] == label[1]) {
		assert_int_equal(label[0] & 0xffff, index);
		fill_word(want, label[0]);
		assert_memory_equal(page, want, PAGE_BYTES);
	} else {
		assert_int_equal(label[0], index);
		make_labelled(want, index, label[1]);
		assert_memory_equal(page, want, PAGE_BYTES);
	}
}

static void refused(struct scene *s, int64_t rv)
{
	assert_that(rv == -ENOSPC && s->options.mem_limit, "refused: %lld", (long long)rv);
	atomic_fetch_add(&s->nr_refused, 1);
}

static void share_pages(struct worker *w, uint8_t *bytes)
{
	struct store *store = w->scene->store;
	uint64_t nr = 1 + random_below(&w->seed, BURST);
	uint64_t index = random_below(&w->seed, NR_SHARED - nr);
	uint64_t what = random_below(&w->seed, 10);
	int64_t rv;

	if (what < 4) {
		for (uint64_t i = 0; i < nr; i++)
			make_labelled(bytes + i * PAGE_BYTES, index + i,
				      next_random(&w->seed) | 1ULL << 40);
		rv = store_write(store, index, nr, bytes);
		if (rv != (int64_t)nr)
			refused(w->scene, rv > 0 ? -ENOSPC : rv);
	} else if (what < 8) {
		assert_int_equal(store_read(store, index, nr, bytes), nr);
		for (uint64_t i = 0; i < nr; i++)
			assert_labelled(bytes + i * PAGE_BYTES, index + i);
	} else {
		rv = store_discard(store, index, nr);
		assert_in_range(rv, 0, nr);
		atomic_fetch_add(&w->scene->nr_held, (uint64_t)rv);
	}
}

/* A cell that only this worker writes, in a page that all of them change. */
static void change_cell(struct worker *w, uint64_t *versions)
{
	struct store *store = w->scene->store;
	uint64_t cell = random_below(&w->seed, NR_PARTED * NR_CELLS / NR_WORKERS);
	uint64_t offset =
		(NR_SHARED * (uint64_t)PAGE_BYTES) + (cell * NR_WORKERS + w->number) * CELL_BYTES;
	uint64_t words[CELL_BYTES / 8];
	int64_t rv;

	assert_int_equal(store_pread(store, offset, CELL_BYTES, words), CELL_BYTES);
	for (size_t i = 0; i < ARRAY_SIZE(words); i++)
		assert_int_equal(words[i], versions[cell]);
	for (size_t i = 0; i < ARRAY_SIZE(words); i++)
		words[i] = versions[cell] + 1 + w->number * 1000000ULL;
	rv = random_below(&w->seed, 8) ? store_pwrite(store, offset, CELL_BYTES, words)
				       : store_punch(store, offset, CELL_BYTES);
	if (rv == CELL_BYTES)
		versions[cell] = words[0];
	else if (rv == 0)
		versions[cell] = 0;
	else
		refused(w->scene, rv);
}

static void *work(void *arg)
{
	struct worker *w = arg;
	uint8_t *bytes = malloc(BURST * PAGE_BYTES);
	uint64_t *versions = calloc(NR_PARTED * NR_CELLS, sizeof(*versions));

	for (int i = 0; i < w->scene->nr_steps; i++) {
		if (random_below(&w->seed, 3))
			share_pages(w, bytes);
		else
			change_cell(w, versions);
	}
	free(versions);
	free(bytes);
	return NULL;
}

static void *compact(void *arg)
{
	struct scene *s = arg;

	while (!s->stop) {
		assert_true(store_compact(s->store, UINT64_MAX) >= 0);
		usleep(200);
	}
	return NULL;
}

/* What is counted is true at any moment. */
static void *watch_counters(void *arg)
{
	struct scene *s = arg;
	int event = eventfd(0, EFD_NONBLOCK);
	uint64_t freed = 0;

	while (!s->stop) {
		struct store_stats now = stats_of(s->store);

		if (s->options.mem_limit)
			assert_true(now.mem_used_bytes + now.reserve_bytes <= s->options.mem_limit);
		assert_true(now.notify_free >= freed);
		assert_int_equal(now.failed_reads + now.invalid_io, 0);
		freed = now.notify_free;
		store_watch(s->store, event, 100000);
		usleep(300);
	}
	store_watch(s->store, -1, 0);
	close(event);
	return NULL;
}

static void run(uint32_t chunk_bytes, uint64_t mem_limit, int nr_steps)
{
	struct scene s = {.options = {.nr_pages = NR_SHARED + NR_PARTED,
				      .mem_limit = mem_limit,
				      .reserve_bytes = 4 * chunk_bytes,
				      .chunk_bytes = chunk_bytes},
			  .nr_steps = nr_steps};
	struct worker workers[NR_WORKERS];
	pthread_t compactor, watcher;
	uint8_t page[PAGE_BYTES];
	int fd = open_memory();

	assert_int_equal(store_create(&s.store, fd, &s.options), 0);
	pthread_create(&compactor, NULL, compact, &s);
	pthread_create(&watcher, NULL, watch_counters, &s);
	for (uint32_t i = 0; i < NR_WORKERS; i++) {
		workers[i] = (struct worker){&s, i, chunk_bytes + i, 0};
		pthread_create(&workers[i].thread, NULL, work, &workers[i]);
	}
	for (uint32_t i = 0; i < NR_WORKERS; i++)
		pthread_join(workers[i].thread, NULL);
	s.stop = true;
	pthread_join(compactor, NULL);
	pthread_join(watcher, NULL);

	assert_sound(s.store);
	for (uint64_t i = 0; i < NR_SHARED; i++) {
		assert_int_equal(store_read(s.store, i, 1, page), 1);
		assert_labelled(page, i);
	}
	assert_int_equal(stats_of(s.store).notify_free, s.nr_held);
	assert_int_equal(store_rebuild(s.store), 0);
	assert_sound(s.store);
	store_discard(s.store, 0, s.options.nr_pages);
	region_settle(s.store->region);
	assert_int_equal(stats_of(s.store).mem_used_bytes, 0);
	if (mem_limit)
		assert_true(s.nr_refused > 0);
	store_destroy(s.store);
	close(fd);
}

static void test_threads_share_pages(void **state)
{
	(void)state;
	run(65536, 0, 4000);
	run(16384, 0, 4000);
}

/* Raw pages have chunks of their own there. */
static void test_threads_share_pages_of_the_classic_arena(void **state)
{
	(void)state;
	run(4096, 0, 4000);
}

/* Refused writes are the only thing that a limit changes. */
static void test_threads_at_the_limit(void **state)
{
	(void)state;
	run(16384, 256 * KIB, 4000);
	run(4096, 256 * KIB, 4000);
	run(65536, 320 * KIB, 4000);
}

/* No reserve to speak of: all wait for the keeper, over and over. */
struct burst {
	struct store *store;
	uint64_t first;
};

static void *fill_and_discard(void *arg)
{
	struct burst *b = arg;
	uint8_t *bytes = malloc(64 * PAGE_BYTES);

	for (uint64_t i = 0; i < 64; i++)
		make_page(bytes + i * PAGE_BYTES, PAGE_RANDOM, b->first + i);
	for (int round = 0; round < 30; round++) {
		assert_int_equal(store_write(b->store, b->first, 64, bytes), 64);
		assert_int_equal(store_discard(b->store, b->first, 64), 64);
	}
	free(bytes);
	return NULL;
}

static void test_threads_exhaust_the_reserve(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 24 * 64, 65536, 0, 0);
	struct burst bursts[24]; /* more than there are desks */
	pthread_t threads[24];

	(void)state;
	for (uint64_t i = 0; i < 24; i++) {
		bursts[i] = (struct burst){store, i * 64};
		pthread_create(&threads[i], NULL, fill_and_discard, &bursts[i]);
	}
	for (int i = 0; i < 24; i++)
		pthread_join(threads[i], NULL);
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_threads_share_pages),
		cmocka_unit_test(test_threads_share_pages_of_the_classic_arena),
		cmocka_unit_test(test_threads_at_the_limit),
		cmocka_unit_test(test_threads_exhaust_the_reserve),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
