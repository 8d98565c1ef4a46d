/* SPDX-License-Identifier: MIT
 *
 * Failure sweep: the Nth call that asks for memory, or gives it back, fails, for each N of a
 * history: pages hold what they should, the store is sound, and it goes on afterwards. The linker
 * leads calls to the __wrap_ functions here (see CMakeLists.txt).
 */
#include "model.h"
#include "seam.h"

static struct seam alloc_seam, heap_seam;
static bool sweeping_heap;

int __real_arena_alloc(struct arena *arena, uint32_t bytes, uint32_t owner, bool compacting,
		       uint64_t *place);
int __wrap_arena_alloc(struct arena *arena, uint32_t bytes, uint32_t owner, bool compacting,
		       uint64_t *place);
void *__real_calloc(size_t nr, size_t bytes);
void *__wrap_calloc(size_t nr, size_t bytes);
void *__real_malloc(size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__real_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *),
			  void *arg);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *),
			  void *arg);

int __wrap_arena_alloc(struct arena *arena, uint32_t bytes, uint32_t owner, bool compacting,
		       uint64_t *place)
{
	if (seam_fails(&alloc_seam))
		return -ENOSPC;
	return __real_arena_alloc(arena, bytes, owner, compacting, place);
}

static bool heap_fails(void)
{
	return sweeping_heap && seam_fails(&heap_seam);
}

void *__wrap_calloc(size_t nr, size_t bytes)
{
	return heap_fails() ? NULL : __real_calloc(nr, bytes);
}

void *__wrap_malloc(size_t bytes)
{
	return heap_fails() ? NULL : __real_malloc(bytes);
}

void *__wrap_mmap(void *at, size_t bytes, int prot, int flags, int fd, off_t offset)
{
	return heap_fails() ? MAP_FAILED : __real_mmap(at, bytes, prot, flags, fd, offset);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *),
			  void *arg)
{
	return heap_fails() ? EAGAIN : __real_pthread_create(thread, attr, start, arg);
}

/* Ask for more than the reserve, and give all of it back. */
static void fill_and_empty(struct model *m)
{
	for (uint64_t i = 0; i < m->nr_pages; i++) {
		make_page(m->buffer, PAGE_RANDOM, i);
		store_write(m->store, i, 1, m->buffer);
	}
	assert_true(store_discard(m->store, 0, m->nr_pages) >= 0);
	memset(m->bytes, 0, m->size);
	region_settle(m->store->region);
	assert_sound(m->store);
}

/* A short history in which the (@pass + 1)th call fails, and @fail - 1 more. Returns whether there
 * were as many calls. */
static bool history(struct seam *seam, int pass, int fail, uint32_t chunk_bytes)
{
	struct model m;
	bool failed;

	model_open(&m, 90, chunk_bytes, 0, 2 * chunk_bytes);
	m.may_refuse = true;
	seam_set(seam, pass, fail, ENOMEM);
	for (int i = 0; i < 16; i++) {
		model_step(&m);
		assert_sound(m.store);
	}
	fill_and_empty(&m);
	for (int i = 0; i < 4; i++)
		model_step(&m);
	failed = seam->calls > pass;
	model_compare(&m);
	seam_reset();
	seam_set(&alloc_seam, 0, 0, 0);
	m.may_refuse = false;
	for (int i = 0; i < 8; i++)
		model_step(&m);
	model_check(&m);
	model_compare(&m);
	model_close(&m);
	return failed;
}

static void sweep(struct seam *seam)
{
	static const uint32_t chunk_sizes[] = {4096, 16384, 65536};

	for (size_t c = 0; c < ARRAY_SIZE(chunk_sizes); c++) {
		for (int fail = 1; fail <= 4; fail += 3) {
			int n = 0;

			while (history(seam, n, fail, chunk_sizes[c]))
				n++;
			/* So many that the sweep did not end before it began. */
			assert_true(n >= 1);
		}
	}
}

static void test_each_allocation_may_fail(void **state)
{
	(void)state;
	sweep(&alloc_seam);
}

static void test_each_populating_may_fail(void **state)
{
	(void)state;
	sweep(&populate_seam);
	sweep(&advise_seam);
}

static void test_each_punch_may_fail(void **state)
{
	(void)state;
	sweep(&punch_seam);
}

/* Opening a region: what fails leaves it as it was, and the next try has all pages. */
static void test_each_call_of_adopting_may_fail(void **state)
{
	struct model m;
	int n = 0;
	int rv;

	(void)state;
	model_open(&m, 90, 16384, 0, 128 * KIB);
	for (int i = 0; i < 40; i++)
		model_step(&m);
	do {
		store_destroy(m.store);
		seam_set(&heap_seam, n++, 1, ENOMEM);
		sweeping_heap = true;
		rv = store_adopt(&m.store, m.fd);
		sweeping_heap = false;
		if (rv) {
			assert_true(rv == -ENOMEM || rv == -EAGAIN);
			assert_int_equal(store_adopt(&m.store, m.fd), 0);
			rv = 1;
		}
		assert_sound(m.store);
		model_compare(&m);
	} while (rv);
	assert_true(n > 5);
	model_close(&m);
}

static void test_each_call_of_creating_may_fail(void **state)
{
	struct store_options options = {.nr_pages = 90, .chunk_bytes = 65536};
	struct store *store = NULL;
	int fd = open_memory();
	int n = 0;
	int rv;

	(void)state;
	do {
		seam_set(&heap_seam, n++, 1, ENOMEM);
		sweeping_heap = true;
		rv = store_create(&store, fd, &options);
		sweeping_heap = false;
		assert_true(rv == 0 || rv == -ENOMEM || rv == -EAGAIN);
	} while (rv);
	assert_true(n > 4);
	assert_sound(store);
	store_destroy(store);
	close(fd);
}

/* A rebuild in place that has no memory changes nothing. */
static void test_each_call_of_rebuilding_may_fail(void **state)
{
	struct model m;

	(void)state;
	model_open(&m, 90, 16384, 0, 128 * KIB);
	for (int i = 0; i < 40; i++)
		model_step(&m);
	for (int n = 0; n < 2; n++) {
		seam_set(&heap_seam, n, 1, ENOMEM);
		sweeping_heap = true;
		assert_int_equal(store_rebuild(m.store), -ENOMEM);
		sweeping_heap = false;
		assert_sound(m.store);
		model_compare(&m);
	}
	model_close(&m);
}

/* Filled to the limit with pages that do not compress: each refused page keeps what it held. Then
 * some are freed, and there is room for as many as before; again and again. */
static void at_the_limit(uint32_t chunk_bytes, bool compacting)
{
	const uint64_t limit = 64ULL * 65536;
	struct model m;
	uint64_t held[6];

	model_open(&m, 2000, chunk_bytes, limit, 256 * KIB);
	for (uint64_t round = 0; round < ARRAY_SIZE(held); round++) {
		uint64_t refused = m.nr_refused;

		for (uint64_t i = 0; i < m.nr_pages; i++) {
			make_page(m.buffer, PAGE_RANDOM, i + round * m.nr_pages);
			if (store_write(m.store, i, 1, m.buffer) == 1)
				memcpy(m.bytes + i * PAGE_BYTES, m.buffer, PAGE_BYTES);
			else
				m.nr_refused++;
		}
		assert_true(m.nr_refused > refused);
		model_check(&m);
		model_compare(&m);
		held[round] = stats_of(m.store).pages_stored;
		assert_true(held[round] >= held[0] - held[0] / 16);
		assert_int_equal(stats_of(m.store).failed_writes, m.nr_refused);
		for (uint64_t i = round; i < m.nr_pages; i += 2) {
			assert_true(store_discard(m.store, i, 1) >= 0);
			memset(m.bytes + i * PAGE_BYTES, 0, PAGE_BYTES);
		}
		if (compacting)
			store_compact(m.store, UINT64_MAX);
	}
	model_close(&m);
}

static void test_full_store_goes_on_when_pages_are_freed(void **state)
{
	(void)state;
	for (uint32_t chunk = 4096; chunk <= 65536; chunk *= 16) {
		at_the_limit(chunk, false);
		at_the_limit(chunk, true);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_each_allocation_may_fail),
		cmocka_unit_test(test_each_populating_may_fail),
		cmocka_unit_test(test_each_punch_may_fail),
		cmocka_unit_test(test_each_call_of_adopting_may_fail),
		cmocka_unit_test(test_each_call_of_creating_may_fail),
		cmocka_unit_test(test_each_call_of_rebuilding_may_fail),
		cmocka_unit_test(test_full_store_goes_on_when_pages_are_freed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
