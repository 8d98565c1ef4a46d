/* SPDX-License-Identifier: MIT
 *
 * Random histories of one store against plain bytes: sizes, chunk sizes, limits, failing calls.
 */
#include "model.h"
#include "seam.h"

static const uint32_t chunk_sizes[] = {4096, 8192, 16384, 65536};

static void live(struct model *m, int steps)
{
	for (int i = 0; i < steps; i++) {
		model_step(m);
		model_check(m);
		if (i % 32 == 31)
			model_compare(m);
	}
	model_compare(m);
}

/* When all pages are discarded, nothing is left and all memory is back. */
static void assert_all_comes_back(struct model *m)
{
	struct store_stats s;

	assert_true(store_discard(m->store, 0, m->nr_pages) >= 0);
	region_settle(m->store->region);
	assert_sound(m->store);
	s = stats_of(m->store);
	assert_int_equal(s.pages_stored + s.same_pages + s.compr_bytes, 0);
	assert_int_equal(s.mem_used_bytes, 0);
	assert_int_equal(s.nr_chunks, 0);
	assert_int_equal(s.free_bytes, 0);
	memset(m->bytes, 0, m->size);
	model_compare(m);
}

/* Sizes around the tables' units, one page and two. */
static void test_histories_of_files_of_any_size(void **state)
{
	static const uint64_t sizes[] = {1, 2, 63, 64, 65, 511, 512, 513};

	(void)state;
	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		struct model m;

		model_open(&m, sizes[i], 65536, 0, 256 * KIB);
		live(&m, 400);
		assert_all_comes_back(&m);
		model_close(&m);
	}
}

/* Each chunk size; 4096 keeps raw pages in chunks of their own. */
static void test_histories_with_any_chunk_size(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_SIZE(chunk_sizes); i++) {
		struct model m;

		model_open(&m, 200, chunk_sizes[i], 0, 256 * KIB);
		live(&m, 1000);
		assert_all_comes_back(&m);
		model_close(&m);
	}
}

/* A limit that is too small for the file: refused writes change nothing, the rest goes on. */
static void test_histories_at_the_limit(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_SIZE(chunk_sizes); i++) {
		uint64_t nr_refused = 0;

		for (uint64_t limit = 64 * KIB; limit <= 224 * KIB; limit += 32 * KIB) {
			struct model m;

			model_open(&m, 200, chunk_sizes[i], limit, 128 * KIB);
			live(&m, 300);
			nr_refused += m.nr_refused;
			assert_all_comes_back(&m);
			model_close(&m);
		}
		assert_true(nr_refused > 100);
	}
}

/* A reserve of one chunk: every burst exhausts it. */
static void test_histories_without_reserve(void **state)
{
	(void)state;
	for (size_t i = 0; i < ARRAY_SIZE(chunk_sizes); i++) {
		struct model m;

		model_open(&m, 200, chunk_sizes[i], 0, 0);
		live(&m, 200);
		assert_all_comes_back(&m);
		model_close(&m);
	}
}

/* The Nth time that memory is asked for, or given back, fails, for each N. */
static void history_with_faults(struct seam *seam, int pass, int fail, uint32_t chunk_bytes)
{
	struct model m;

	model_open(&m, 120, chunk_bytes, 0, 2 * chunk_bytes);
	m.may_refuse = true;
	m.seed += (uint64_t)pass;
	seam_set(seam, pass, fail, ENOMEM);
	for (int i = 0; i < 40; i++) {
		model_step(&m);
		assert_sound(m.store);
	}
	model_compare(&m);
	seam_reset();
	m.may_refuse = false;
	for (int i = 0; i < 10; i++)
		model_step(&m);
	model_check(&m);
	model_compare(&m);
	model_close(&m);
}

static void test_histories_with_failing_calls(void **state)
{
	(void)state;
	for (int n = 0; n < 40; n++) {
		uint32_t chunk = chunk_sizes[n % 4];

		history_with_faults(&populate_seam, n, 1 + n % 7, chunk);
		history_with_faults(&punch_seam, n, 1 + n % 7, chunk);
		history_with_faults(&advise_seam, n, 1 + n % 7, chunk);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_histories_of_files_of_any_size),
		cmocka_unit_test(test_histories_with_any_chunk_size),
		cmocka_unit_test(test_histories_at_the_limit),
		cmocka_unit_test(test_histories_without_reserve),
		cmocka_unit_test(test_histories_with_failing_calls),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
