/* SPDX-License-Identifier: MIT
 *
 * model - a store and, beside it, the plain bytes that it should hold; random histories of both
 */
#ifndef MODEL_H
#define MODEL_H

#include "fixture.h"

#define MODEL_MAX_BURST 40 /* pages in one request; more than one batch */

struct model {
	int fd;
	struct store *store;
	struct store_options options;
	uint64_t nr_pages, size;
	uint8_t *bytes;
	uint8_t *buffer; /* MODEL_MAX_BURST pages and one more */
	uint64_t seed;
	uint64_t nr_refused; /* requests that ended short or with -ENOSPC */
	bool may_refuse;     /* even without a memory limit */
};

static inline void model_open(struct model *m, uint64_t nr_pages, uint32_t chunk_bytes,
			      uint64_t mem_limit, uint64_t reserve_bytes)
{
	*m = (struct model){
		.fd = open_memory(),
		.options = {.nr_pages = nr_pages,
			    .mem_limit = mem_limit,
			    .reserve_bytes = reserve_bytes,
			    .chunk_bytes = chunk_bytes},
		.nr_pages = nr_pages,
		.size = nr_pages * PAGE_BYTES,
		.bytes = calloc(nr_pages, PAGE_BYTES),
		.buffer = malloc((MODEL_MAX_BURST + 1) * PAGE_BYTES),
		.seed = nr_pages * 31 + chunk_bytes + mem_limit,
	};
	assert_int_equal(store_create(&m->store, m->fd, &m->options), 0);
}

static inline void model_close(struct model *m)
{
	store_destroy(m->store);
	close(m->fd);
	free(m->bytes);
	free(m->buffer);
}

static inline uint64_t model_random(struct model *m, uint64_t end)
{
	return random_below(&m->seed, end);
}

/* Compare all that the store holds with what it should. */
static inline void model_compare(struct model *m)
{
	for (uint64_t i = 0; i < m->nr_pages; i++) {
		assert_that(store_read(m->store, i, 1, m->buffer) == 1, "page %llu is not readable",
			    (unsigned long long)i);
		assert_that(!memcmp(m->buffer, m->bytes + i * PAGE_BYTES, PAGE_BYTES),
			    "page %llu has other content", (unsigned long long)i);
	}
}

/* What the counters promise, whatever happened before. */
static inline void model_check_stats(struct model *m)
{
	struct store_stats s = stats_of(m->store);

	assert_int_equal(s.nr_pages, m->nr_pages);
	assert_true(s.pages_stored + s.same_pages <= m->nr_pages);
	assert_true(s.good_pages + s.raw_pages <= s.pages_stored);
	assert_true(s.compr_bytes <= s.pages_stored * PAGE_BYTES);
	assert_true(s.raw_pages * PAGE_BYTES <= s.compr_bytes);
	assert_true(s.mem_used_bytes + s.free_bytes >= s.compr_bytes);
	if (m->options.mem_limit)
		assert_that(s.mem_used_bytes + s.reserve_bytes <= m->options.mem_limit,
			    "%llu bytes used and %llu in reserve of %llu",
			    (unsigned long long)s.mem_used_bytes,
			    (unsigned long long)s.reserve_bytes,
			    (unsigned long long)m->options.mem_limit);
	assert_int_equal(s.failed_reads, 0);
	assert_int_equal(s.invalid_io, 0);
}

static inline void model_check(struct model *m)
{
	assert_sound(m->store);
	model_check_stats(m);
}

static inline void model_refused(struct model *m, int64_t rv)
{
	assert_that(rv == -ENOSPC && (m->options.mem_limit || m->may_refuse), "refused: %lld",
		    (long long)rv);
	m->nr_refused++;
}

static inline enum page_kind model_kind(struct model *m)
{
	return (enum page_kind)model_random(m, NR_PAGE_KINDS);
}

static inline void model_write(struct model *m)
{
	uint64_t index = model_random(m, m->nr_pages);
	uint64_t most = m->nr_pages - index;
	uint64_t nr = 1 + model_random(m, most < MODEL_MAX_BURST ? most : MODEL_MAX_BURST);
	int64_t rv;

	for (uint64_t i = 0; i < nr; i++)
		make_page(m->buffer + i * PAGE_BYTES, model_kind(m), next_random(&m->seed));
	rv = store_write(m->store, index, nr, m->buffer);
	if (rv != (int64_t)nr)
		model_refused(m, rv > 0 ? -ENOSPC : rv);
	if (rv > 0)
		memcpy(m->bytes + index * PAGE_BYTES, m->buffer, (uint64_t)rv * PAGE_BYTES);
}

/* Any offset in the file, and a length up to three pages and a bit. */
static inline void model_range(struct model *m, uint64_t *offset, uint64_t *length)
{
	static const uint64_t edges[] = {0, 1, 7, 4095, 2048};

	*offset = model_random(m, m->nr_pages) * PAGE_BYTES;
	*offset += model_random(m, 2) ? edges[model_random(m, 5)] : model_random(m, PAGE_BYTES);
	*length = model_random(m, 4) * PAGE_BYTES;
	*length += model_random(m, 2) ? edges[model_random(m, 5)] : model_random(m, PAGE_BYTES);
	if (*length > m->size - *offset)
		*length = m->size - *offset;
}

static inline void model_pwrite(struct model *m)
{
	uint64_t offset, length;
	int64_t rv;

	model_range(m, &offset, &length);
	for (int i = 0; i < 5; i++)
		make_page(m->buffer + i * PAGE_BYTES, model_kind(m), next_random(&m->seed));
	rv = store_pwrite(m->store, offset, length, m->buffer);
	if (rv != (int64_t)length)
		model_refused(m, rv >= 0 ? -ENOSPC : rv);
	if (rv > 0)
		memcpy(m->bytes + offset, m->buffer, (uint64_t)rv);
}

/* Where punching was refused, each page is as before, or punched. */
static inline void model_punch_refused(struct model *m, uint64_t offset, uint64_t length)
{
	uint64_t end = offset + length;

	for (uint64_t at = offset; at < end;) {
		uint64_t page = at / PAGE_BYTES;
		uint64_t next = (page + 1) * PAGE_BYTES < end ? (page + 1) * PAGE_BYTES : end;

		assert_int_equal(store_read(m->store, page, 1, m->buffer), 1);
		if (memcmp(m->buffer, m->bytes + page * PAGE_BYTES, PAGE_BYTES))
			memset(m->bytes + at, 0, next - at);
		at = next;
	}
}

static inline void model_punch(struct model *m)
{
	uint64_t offset, length;
	int rv;

	model_range(m, &offset, &length);
	rv = store_punch(m->store, offset, length ? length : 1);
	if (rv) {
		model_refused(m, rv);
		model_punch_refused(m, offset, length ? length : 1);
	} else {
		memset(m->bytes + offset, 0, length ? length : 1);
	}
}

/* NotifyFree rises by what was held, which is what the pages held fall by. */
static inline void model_discard(struct model *m)
{
	uint64_t index = model_random(m, m->nr_pages);
	uint64_t nr = 1 + model_random(m, m->nr_pages - index < 60 ? m->nr_pages - index : 60);
	struct store_stats before = stats_of(m->store), after;
	int64_t held = store_discard(m->store, index, nr);

	after = stats_of(m->store);
	assert_true(held >= 0 && held <= (int64_t)nr);
	assert_int_equal(after.notify_free - before.notify_free, held);
	assert_int_equal(after.discards - before.discards, nr);
	assert_int_equal(before.pages_stored + before.same_pages - after.pages_stored -
				 after.same_pages,
			 held);
	memset(m->bytes + index * PAGE_BYTES, 0, nr * PAGE_BYTES);
}

static inline void model_read(struct model *m)
{
	uint64_t index = model_random(m, m->nr_pages);
	uint64_t most = m->nr_pages - index;
	uint64_t nr = 1 + model_random(m, most < MODEL_MAX_BURST ? most : MODEL_MAX_BURST);

	assert_int_equal(store_read(m->store, index, nr, m->buffer), nr);
	assert_memory_equal(m->buffer, m->bytes + index * PAGE_BYTES, nr * PAGE_BYTES);
}

static inline void model_pread(struct model *m)
{
	uint64_t offset, length;

	model_range(m, &offset, &length);
	assert_int_equal(store_pread(m->store, offset, length, m->buffer), length);
	assert_memory_equal(m->buffer, m->bytes + offset, length);
}

/* Nothing but the memory used and what compaction counts may change. */
static inline void model_compact(struct model *m, uint64_t max_bytes)
{
	struct store_stats before = stats_of(m->store), after;

	assert_true(store_compact(m->store, max_bytes) >= 0);
	after = stats_of(m->store);
	assert_int_equal(after.pages_stored, before.pages_stored);
	assert_int_equal(after.compr_bytes, before.compr_bytes);
	assert_that(after.mem_used_bytes <= before.mem_used_bytes, "%llu bytes became %llu",
		    (unsigned long long)before.mem_used_bytes,
		    (unsigned long long)after.mem_used_bytes);
}

/* As after a crash: another process, the same memory. Counters stay. */
static inline void model_adopt(struct model *m)
{
	struct store_stats before = stats_of(m->store), after;

	store_destroy(m->store);
	assert_int_equal(store_adopt(&m->store, m->fd), 0);
	after = stats_of(m->store);
	assert_int_equal(after.pages_stored, before.pages_stored);
	assert_int_equal(after.same_pages, before.same_pages);
	assert_int_equal(after.compr_bytes, before.compr_bytes);
	assert_int_equal(after.good_pages, before.good_pages);
	assert_int_equal(after.raw_pages, before.raw_pages);
	assert_int_equal(after.writes, before.writes);
	assert_int_equal(after.notify_free, before.notify_free);
}

/* One random request. */
static inline void model_step(struct model *m)
{
	uint64_t what = model_random(m, 100);

	if (what < 30)
		model_write(m);
	else if (what < 50)
		model_pwrite(m);
	else if (what < 60)
		model_punch(m);
	else if (what < 75)
		model_discard(m);
	else if (what < 85)
		model_read(m);
	else if (what < 95)
		model_pread(m);
	else if (what < 97)
		model_compact(m, model_random(m, 2) ? UINT64_MAX : 1);
	else if (what < 98)
		model_adopt(m);
	else
		assert_int_equal(store_rebuild(m->store), 0);
}

#endif
