/* SPDX-License-Identifier: MIT
 *
 * store_io - the store as a file has it: any offset, any length
 *
 * A request is a partial page, whole pages, and a partial page, each of which may be missing.
 * Partial pages are read, changed and written under their slot's lock.
 */
#include "store.h"

#include <errno.h>
#include <string.h>

#define OFFSET_MAX ((uint64_t)INT64_MAX)

/* The part of [offset, offset+length) in its first page, or the whole pages it begins with. */
struct span {
	uint64_t index;
	uint64_t nr_pages; /* 0: a partial page */
	uint32_t from;	   /* in the partial page */
	uint64_t bytes;
};

static struct span first_span(uint64_t offset, uint64_t length)
{
	struct span span = {.index = offset / PAGE_BYTES, .from = (uint32_t)(offset % PAGE_BYTES)};

	if (span.from == 0 && length >= PAGE_BYTES) {
		span.nr_pages = length / PAGE_BYTES;
		span.bytes = span.nr_pages * PAGE_BYTES;
	} else {
		span.bytes = PAGE_BYTES - span.from;
		if (span.bytes > length)
			span.bytes = length;
	}
	return span;
}

static int read_part(struct store *store, const struct span *span, void *bytes)
{
	struct scratch *s = store_enter(store);
	slot_t *slot = &store->region->slots[span->index];
	int rv = 0;

	if (region_touched(store->region, span->index)) {
		rv = store_load(store, span->index, slot_lock(slot), s->page);
		slot_unlock(slot);
	} else {
		codec_fill(s->page, 0);
	}
	memcpy(bytes, s->page + span->from, span->bytes);
	codec_fill(s->page, 0);
	counter_add(&s->counters->reads, 1);
	if (rv)
		counter_add(&s->counters->failed_reads, 1);
	store_leave(s);
	return rv;
}

/* Replace a part of a page by @bytes, or by zeroes where NULL. */
static int change_part(struct store *store, const struct span *span, const void *bytes)
{
	struct scratch *s = store_enter(store);
	slot_t *slot = &store->region->slots[span->index];
	int rv;

	region_touch(store->region, span->index);
	s->old[0] = slot_lock(slot);
	rv = store_load(store, span->index, s->old[0], s->page);
	if (rv) {
		slot_unlock(slot);
		counter_add(&s->counters->failed_reads, 1);
	} else if (!bytes && slot_state(s->old[0]) == SLOT_STATE_EMPTY) {
		slot_unlock(slot); /* it reads as zeroes already */
	} else {
		if (bytes)
			memcpy(s->page + span->from, bytes, span->bytes);
		else
			memset(s->page + span->from, 0, span->bytes);
		store_stage(s, 0, s->page);
		rv = store_commit(store, s, span->index, 1) == 1 ? 0 : -ENOSPC;
	}
	codec_fill(s->page, 0);
	if (bytes) {
		counter_add(&s->counters->writes, 1);
		counter_add(&s->counters->failed_writes, rv != 0);
	}
	store_leave(s);
	return rv;
}

int64_t store_pread(struct store *store, uint64_t offset, uint64_t length, void *bytes)
{
	uint64_t size = store->nr_pages * PAGE_BYTES;
	uint64_t done = 0;

	if (offset > OFFSET_MAX || length > OFFSET_MAX - offset) {
		store_note_invalid(store);
		return -EINVAL;
	}
	if (offset >= size)
		return 0;
	if (length > size - offset)
		length = size - offset;
	while (done < length) {
		struct span span = first_span(offset + done, length - done);
		void *to = (char *)bytes + done;
		int64_t rv = span.nr_pages ? store_read(store, span.index, span.nr_pages, to)
					   : read_part(store, &span, to);

		if (rv < 0)
			return rv;
		done += span.bytes;
	}
	return (int64_t)done;
}

int64_t store_pwrite(struct store *store, uint64_t offset, uint64_t length, const void *bytes)
{
	uint64_t size = store->nr_pages * PAGE_BYTES;
	uint64_t done = 0;

	if (offset > size || length > size - offset) {
		store_note_invalid(store);
		return -EFBIG;
	}
	while (done < length) {
		struct span span = first_span(offset + done, length - done);
		const void *from = (const char *)bytes + done;
		int64_t rv;

		if (span.nr_pages) {
			rv = store_write(store, span.index, span.nr_pages, from);
			if (rv > 0)
				done += (uint64_t)rv * PAGE_BYTES;
			if (rv == (int64_t)span.nr_pages)
				continue;
			rv = rv < 0 ? rv : -ENOSPC;
		} else {
			rv = change_part(store, &span, from);
			if (!rv) {
				done += span.bytes;
				continue;
			}
		}
		return done ? (int64_t)done : rv;
	}
	return (int64_t)done;
}

int store_punch(struct store *store, uint64_t offset, uint64_t length)
{
	uint64_t size = store->nr_pages * PAGE_BYTES;
	int64_t rv = 0;

	if (!length || offset > OFFSET_MAX || length > OFFSET_MAX - offset) {
		store_note_invalid(store);
		return -EINVAL;
	}
	if (offset >= size)
		return 0;
	if (length > size - offset)
		length = size - offset;
	while (length && rv >= 0) {
		struct span span = first_span(offset, length);

		if (span.nr_pages)
			rv = store_discard(store, span.index, span.nr_pages);
		else if (region_touched(store->region, span.index))
			rv = change_part(store, &span, NULL);
		offset += span.bytes;
		length -= span.bytes;
	}
	return rv < 0 ? (int)rv : 0;
}
