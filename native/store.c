/* SPDX-License-Identifier: MIT
 *
 * store - whole pages in, whole pages out; see store.h for the order of things
 */
#include "store.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "memory.h"

static int store_open(struct store **out, int fd)
{
	size_t bytes = sizeof(struct scratch) * REGION_NR_COUNTERS;
	struct store *store = calloc(1, sizeof(*store));
	int rv;

	if (!store)
		return -ENOMEM;
	rv = region_map(&store->region, fd);
	if (rv)
		goto out_free;
	store->scratch = memory_map(bytes);
	if (!store->scratch) {
		rv = -ENOMEM;
		goto out_region;
	}
	store->compaction = compaction_create();
	if (!store->compaction) {
		rv = -ENOMEM;
		goto out_scratch;
	}
	store->nr_pages = store->region->geometry.nr_pages;
	store->watch_fd = -1;
	pthread_mutex_init(&store->compacting, NULL);
	arena_init(&store->arena, store->region);
	*out = store;
	return 0;
out_scratch:
	munmap(store->scratch, bytes);
out_region:
	region_destroy(store->region);
out_free:
	free(store);
	return rv;
}

static int store_start(struct store **out, struct store *store)
{
	int rv = region_start_keeper(store->region);

	if (rv)
		store_destroy(store);
	else
		*out = store;
	return rv;
}

int store_create(struct store **out, int fd, const struct store_options *options)
{
	struct store *store;
	int rv = region_format(fd, options);

	if (!rv)
		rv = store_open(&store, fd);
	return rv ? rv : store_start(out, store);
}

int store_adopt(struct store **out, int fd)
{
	struct store *store;
	int64_t damaged;
	int rv = store_open(&store, fd);

	if (rv)
		return rv;
	damaged = store_rebuild(store);
	if (damaged < 0) {
		store_destroy(store);
		return (int)damaged;
	}
	return store_start(out, store);
}

void store_destroy(struct store *store)
{
	if (!store)
		return;
	region_destroy(store->region);
	arena_fini(&store->arena);
	pthread_mutex_destroy(&store->compacting);
	compaction_destroy(store->compaction);
	munmap(store->scratch, sizeof(struct scratch) * REGION_NR_COUNTERS);
	free(store);
}

struct scratch *store_enter(struct store *store)
{
	/* In a module that is loaded late, other models ask malloc() at a thread's first use. */
	static _Thread_local uint32_t preferred __attribute__((tls_model("initial-exec"))) =
		UINT32_MAX;
	static _Atomic uint32_t nr_threads;

	if (preferred == UINT32_MAX)
		preferred = atomic_fetch_add(&nr_threads, 1);
	for (uint32_t i = preferred;; i++) {
		struct scratch *s = &store->scratch[i % REGION_NR_COUNTERS];

		if (!atomic_exchange_explicit(&s->busy, 1, memory_order_acquire)) {
			s->counters = &store->region->header->counters[i % REGION_NR_COUNTERS];
			s->patience = (struct region_patience){0};
			return s;
		}
		if (i - preferred >= REGION_NR_COUNTERS)
			sched_yield();
	}
}

void store_leave(struct scratch *scratch)
{
	atomic_store_explicit(&scratch->busy, 0, memory_order_release);
}

void store_note_invalid(struct store *store)
{
	atomic_fetch_add_explicit(&store->region->header->invalid_io, 1, memory_order_relaxed);
}

bool store_in_range(struct store *store, uint64_t index, uint64_t nr)
{
	if (nr && index < store->nr_pages && nr <= store->nr_pages - index)
		return true;
	store_note_invalid(store);
	return false;
}

void store_count_page(struct counters *c, uint64_t word, int n)
{
	uint64_t by = (uint64_t)(int64_t)n;

	if (slot_is_same(word))
		counter_add(&c->same_pages, by);
	if (!slot_has_block(word))
		return;
	counter_add(&c->pages_stored, by);
	counter_add(&c->compr_bytes, by * slot_length(word));
	if (slot_length(word) <= PAGE_BYTES / 2)
		counter_add(&c->good_pages, by);
	if (slot_state(word) == SLOT_STATE_RAW)
		counter_add(&c->raw_pages, by);
}

static uint32_t block_checksum(uint64_t index, const void *payload, uint32_t length)
{
	return codec_checksum(payload, length, index << 13 | length);
}

int store_seal_target(const struct store *store, uint64_t index, uint64_t word, uint64_t *target)
{
	const struct block_tag *tag;

	*target = 0;
	if (slot_has_word(word)) {
		*target = atomic_load_explicit(
			&store->region->words[slot_word_at(index, slot_state(word))],
			memory_order_relaxed);
		return slot_field(word) == slot_word_field(*target) ? 0 : -EIO;
	}
	if (slot_state(word) == SLOT_STATE_SAME)
		return slot_field(word) == slot_same_field(slot_value(word)) ? 0 : -EIO;
	if (!slot_has_block(word))
		return 0;
	if (!arena_holds(&store->arena, store_place(store, word), slot_length(word)))
		return -EIO;
	tag = arena_tag(&store->arena, store_place(store, word));
	*target = tag->checksum;
	if ((store_place(store, word) | store_tie(store, tag->checksum)) != slot_place(word))
		return -EIO;
	return tag->owner == (uint32_t)index ? 0 : -EIO;
}

int store_load(struct store *store, uint64_t index, uint64_t word, void *page)
{
	const void *payload;
	uint64_t target;

	if (store_seal_target(store, index, word, &target) || !slot_is_sealed(word, target))
		return -EIO;
	switch (slot_state(word)) {
	case SLOT_STATE_EMPTY:
		codec_fill(page, 0);
		return word & SLOT_FIELDS ? -EIO : 0;
	case SLOT_STATE_SAME:
		codec_fill(page, slot_value(word));
		return 0;
	case SLOT_STATE_WORD0:
	case SLOT_STATE_WORD1:
		codec_fill(page, target);
		return 0;
	case SLOT_STATE_LZ4:
	case SLOT_STATE_RAW:
		payload = arena_payload(&store->arena, store_place(store, word));
		if (block_checksum(index, payload, slot_length(word)) != (uint32_t)target)
			return -EIO;
		if (slot_state(word) == SLOT_STATE_LZ4)
			return codec_decompress(payload, slot_length(word), page);
		memcpy(page, payload, PAGE_BYTES);
		return slot_length(word) == PAGE_BYTES ? 0 : -EIO;
	}
	return -EIO;
}

int64_t store_read(struct store *store, uint64_t index, uint64_t nr, void *pages)
{
	struct scratch *s;
	uint64_t failed = 0;

	if (!store_in_range(store, index, nr))
		return -EINVAL;
	s = store_enter(store);
	for (uint64_t i = 0; i < nr; i++) {
		slot_t *slot = &store->region->slots[index + i];
		void *page = (char *)pages + i * PAGE_BYTES;

		if (!region_touched(store->region, index + i)) {
			codec_fill(page, 0);
			continue;
		}
		if (store_load(store, index + i, slot_lock(slot), page))
			failed++;
		slot_unlock(slot);
	}
	counter_add(&s->counters->reads, nr);
	if (failed)
		counter_add(&s->counters->failed_reads, failed);
	store_leave(s);
	return failed ? -EIO : (int64_t)nr;
}

void store_stage(struct scratch *s, uint32_t i, const void *page)
{
	struct staged *staged = &s->staged[i];

	*staged = (struct staged){.state = SLOT_STATE_RAW, .length = PAGE_BYTES, .payload = page};
	if (codec_same_filled(page, &staged->value)) {
		staged->state = slot_word_fits(staged->value) ? SLOT_STATE_SAME : SLOT_STATE_WORD0;
		return;
	}
	staged->length = codec_compress(s->codec_state, page, s->compressed[i]);
	if (staged->length) {
		staged->state = SLOT_STATE_LZ4;
		staged->payload = s->compressed[i];
	} else {
		staged->length = PAGE_BYTES;
	}
}

static bool staged_has_block(const struct staged *staged)
{
	return staged->state == SLOT_STATE_LZ4 || staged->state == SLOT_STATE_RAW;
}

void store_unlock_arena(struct store *store)
{
	/* Under the lock: once store_watch() has returned, nobody writes to what was watched before. */
	if (store->watch_fd >= 0 && store->arena.freed_words >= store->watch_words) {
		eventfd_write(store->watch_fd, 1);
		store->watch_fd = -1;
	}
	arena_unlock(&store->arena);
}

/* Returns how many of @nr got their block; the first that did not ends it. */
static uint32_t allocate_blocks(struct store *store, struct scratch *s, uint64_t index, uint32_t nr)
{
	uint32_t i = 0;

	arena_lock(&store->arena);
	while (i < nr) {
		struct staged *staged = &s->staged[i];
		int rv = 0;

		if (staged_has_block(staged))
			rv = arena_alloc(&store->arena, staged->length, (uint32_t)(index + i),
					 false, &staged->place);
		if (rv == -EAGAIN) {
			arena_unlock(&store->arena);
			rv = region_wait_ready(store->region, false, &s->patience);
			arena_lock(&store->arena);
			if (!rv)
				continue;
		}
		if (rv)
			break;
		i++;
	}
	/* At the limit, whoever watches for frees may have something to compact now. */
	if (i < nr)
		store->watch_words = 0;
	store_unlock_arena(store);
	return i;
}

/* Fill the new block, or the place in the word table that @old does not use, and make the slot's
 * word. */
static void fill_block(struct store *store, struct staged *staged, uint64_t index, uint64_t old)
{
	struct block_tag *tag;

	if (staged->state == SLOT_STATE_SAME) {
		staged->word = slot_seal(
			SLOT_STATE_SAME | slot_same_field(staged->value) << SLOT_LENGTH_SHIFT, 0);
		return;
	}
	if (staged->state == SLOT_STATE_WORD0) {
		if (slot_state(old) == SLOT_STATE_WORD0)
			staged->state = SLOT_STATE_WORD1;
		atomic_store_explicit(&store->region->words[slot_word_at(index, staged->state)],
				      staged->value, memory_order_relaxed);
		atomic_store_explicit(&store->region->words_used, true, memory_order_relaxed);
		staged->word = slot_seal((uint64_t)staged->state | slot_word_field(staged->value)
									   << SLOT_LENGTH_SHIFT,
					 staged->value);
		return;
	}
	memcpy(arena_payload(&store->arena, staged->place), staged->payload, staged->length);
	tag = arena_tag(&store->arena, staged->place);
	tag->checksum = block_checksum(index, staged->payload, staged->length);
	staged->word =
		slot_make_block(staged->state, staged->place | store_tie(store, tag->checksum),
				staged->length, tag->checksum);
}

void store_watch(struct store *store, int event_fd, uint64_t freed_bytes)
{
	arena_lock(&store->arena);
	store->watch_fd = event_fd;
	store->watch_words = store->arena.freed_words + freed_bytes / 4;
	store_unlock_arena(store);
}

/* Free the blocks that @nr slots named before; nobody can reach them any more. A damaged slot
 * may name a block that is not its own: that one is left to store_rebuild(). */
static void free_blocks(struct store *store, struct scratch *s, const bool *sound, uint32_t nr)
{
	bool locked = false;

	for (uint32_t i = 0; i < nr; i++)
		if (sound[i])
			arena_wipe(&store->arena, store_place(store, s->old[i]),
				   slot_length(s->old[i]));
	for (uint32_t i = 0; i < nr; i++) {
		if (!sound[i])
			continue;
		if (!locked)
			arena_lock(&store->arena);
		locked = true;
		arena_free(&store->arena, store_place(store, s->old[i]));
	}
	if (locked)
		store_unlock_arena(store);
}

/* Does a locked slot's word name a block that is surely its own? */
static bool names_own_block(const struct store *store, uint64_t index, uint64_t word)
{
	uint64_t target;

	return slot_has_block(word) && !store_seal_target(store, index, word, &target) &&
	       slot_is_sealed(word, target);
}

/* Replace a locked slot's word and unlock it. The word table's old place is cleared in between: not
 * before the slot has changed, and not after somebody else may use it. */
static void replace_word(struct store *store, uint64_t index, uint64_t old, uint64_t word)
{
	slot_t *slot = &store->region->slots[index];

	if (slot_has_word(old)) {
		slot_swing(slot, word | SLOT_LOCK);
		atomic_store_explicit(&store->region->words[slot_word_at(index, slot_state(old))],
				      0, memory_order_relaxed);
	}
	slot_swing(slot, word);
}

/* Leave nothing of a page on the desk. A raw page was given up after any number of bytes. */
static void clear_staged(struct scratch *s, uint32_t nr)
{
	for (uint32_t i = 0; i < nr; i++) {
		const struct staged *staged = &s->staged[i];

		if (staged->state == SLOT_STATE_LZ4)
			memset(s->compressed[i], 0, staged->length);
		else if (staged->state == SLOT_STATE_RAW)
			memset(s->compressed[i], 0, CODEC_MAX_BYTES);
		s->staged[i].value = 0;
	}
}

uint32_t store_commit(struct store *store, struct scratch *s, uint64_t index, uint32_t nr)
{
	slot_t *slots = store->region->slots + index;
	uint32_t stored = allocate_blocks(store, s, index, nr);
	bool sound[STORE_BATCH] = {false};

	for (uint32_t i = 0; i < stored; i++) {
		fill_block(store, &s->staged[i], index + i, s->old[i]);
		sound[i] = names_own_block(store, index + i, s->old[i]);
		replace_word(store, index + i, s->old[i], s->staged[i].word);
		store_count_page(s->counters, s->old[i], -1);
		store_count_page(s->counters, s->staged[i].word, 1);
	}
	for (uint32_t i = stored; i < nr; i++)
		slot_unlock(&slots[i]);
	free_blocks(store, s, sound, stored);
	clear_staged(s, nr);
	return stored;
}

int64_t store_write(struct store *store, uint64_t index, uint64_t nr, const void *pages)
{
	uint64_t done = 0;
	struct scratch *s;

	if (!store_in_range(store, index, nr))
		return -EINVAL;
	s = store_enter(store);
	while (done < nr) {
		const char *from = (const char *)pages + done * PAGE_BYTES;
		uint32_t batch = nr - done < STORE_BATCH ? (uint32_t)(nr - done) : STORE_BATCH;
		uint32_t stored;

		for (uint32_t i = 0; i < batch; i++)
			store_stage(s, i, from + i * (size_t)PAGE_BYTES);
		for (uint32_t i = 0; i < batch; i++) {
			region_touch(store->region, index + done + i);
			s->old[i] = slot_lock(&store->region->slots[index + done + i]);
		}
		stored = store_commit(store, s, index + done, batch);
		done += stored;
		if (stored < batch)
			break;
	}
	counter_add(&s->counters->writes, nr);
	if (done < nr)
		counter_add(&s->counters->failed_writes, nr - done);
	store_leave(s);
	return done ? (int64_t)done : -ENOSPC;
}

static uint32_t discard_batch(struct store *store, struct scratch *s, uint64_t index, uint32_t nr)
{
	bool sound[STORE_BATCH];
	uint32_t held = 0;

	for (uint32_t i = 0; i < nr; i++) {
		slot_t *slot = &store->region->slots[index + i];

		s->old[i] = slot_lock(slot);
		sound[i] = names_own_block(store, index + i, s->old[i]);
		replace_word(store, index + i, s->old[i], 0);
		store_count_page(s->counters, s->old[i], -1);
		held += slot_has_block(s->old[i]) || slot_is_same(s->old[i]);
	}
	free_blocks(store, s, sound, nr);
	return held;
}

int64_t store_discard(struct store *store, uint64_t index, uint64_t nr)
{
	uint64_t held = 0;
	uint64_t at = index;
	struct scratch *s;

	if (!store_in_range(store, index, nr))
		return -EINVAL;
	s = store_enter(store);
	while (at < index + nr) {
		uint64_t page_end = (at / TABLE_SLOTS + 1) * TABLE_SLOTS;
		uint64_t end = page_end < index + nr ? page_end : index + nr;
		uint64_t batch = end - at < STORE_BATCH ? end - at : STORE_BATCH;

		if (!region_touched(store->region, at))
			batch = end - at;
		else
			held += discard_batch(store, s, at, (uint32_t)batch);
		at += batch;
	}
	counter_add(&s->counters->discards, nr);
	counter_add(&s->counters->notify_free, held);
	store_leave(s);
	return (int64_t)held;
}

int64_t store_stored(struct store *store, uint64_t index, void *bytes, uint32_t *state)
{
	struct scratch *s;
	slot_t *slot;
	uint64_t word;
	int64_t rv;

	if (index >= store->nr_pages)
		return -EINVAL;
	*state = SLOT_EMPTY;
	if (!region_touched(store->region, index))
		return 0;
	s = store_enter(store);
	slot = &store->region->slots[index];
	word = slot_lock(slot);
	rv = store_load(store, index, word, s->page);
	if (!rv && slot_is_same(word)) {
		*state = SLOT_SAME;
		memcpy(bytes, s->page, sizeof(word));
		rv = sizeof(word);
	} else if (!rv && slot_has_block(word)) {
		*state = slot_state(word) == SLOT_STATE_RAW ? SLOT_RAW : SLOT_LZ4;
		rv = slot_length(word);
		memcpy(bytes, arena_payload(&store->arena, store_place(store, word)), (size_t)rv);
	}
	slot_unlock(slot);
	codec_fill(s->page, 0);
	store_leave(s);
	return rv;
}
