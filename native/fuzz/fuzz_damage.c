/* SPDX-License-Identifier: MIT
 *
 * Fuzzes the store with bits that flip: an input is a chunk size (1 byte), then operations of 4
 * bytes. Each flip may cost one page, which then reads as EIO; all others have their content,
 * nothing crashes, and a rebuild and discards leave a sound store.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pages.h"
#include "store.h"

#define NR_PAGES 32
#define OP_BYTES 4
#define SLOT_FLIPS 3 /* what a slot's check is sure to find */

static struct store *store;
static int fd;
static uint8_t model[NR_PAGES][PAGE_BYTES];
static uint32_t nr_flips[NR_PAGES]; /* in its slot and words, since it was written */
static uint32_t nr_all_flips;

static void require(bool condition, const char *what)
{
	if (condition)
		return;
	fprintf(stderr, "%s\n", what);
	abort();
}

static void compare(void)
{
	uint8_t page[PAGE_BYTES];
	uint32_t nr_lost = 0;

	for (uint64_t i = 0; i < NR_PAGES; i++) {
		int64_t rv = store_read(store, i, 1, page);

		require(rv == 1 || rv == -EIO, "a page is there or damaged");
		require(rv != 1 || !memcmp(page, model[i], PAGE_BYTES), "what is read is right");
		nr_lost += rv != 1;
	}
	require(nr_lost <= nr_all_flips, "a flipped bit costs one page at the most");
}

static void write_page(uint64_t i, uint8_t seed)
{
	make_page(model[i], (enum page_kind)(seed % NR_PAGE_KINDS), seed);
	require(store_write(store, i, 1, model[i]) == 1, "there is room");
	nr_flips[i] = 0;
}

static void discard(uint64_t i, uint64_t nr)
{
	nr = nr < NR_PAGES - i ? nr : NR_PAGES - i;
	require(store_discard(store, i, nr) >= 0, "pages can be discarded");
	memset(model[i], 0, nr * PAGE_BYTES);
	memset(&nr_flips[i], 0, nr * sizeof(*nr_flips));
}

static void change(uint64_t i, uint32_t at, uint8_t byte)
{
	int64_t rv = store_pwrite(store, i * PAGE_BYTES + at, 1, &byte);

	require(rv == 1 || rv == -EIO, "a part is written, or the rest was damaged");
	if (rv != 1)
		return;
	model[i][at] = byte;
	nr_flips[i] = 0;
}

static void flip_slot(uint64_t i, uint32_t bit)
{
	struct region *region = store->region;

	if (1ULL << bit % 64 & SLOT_LOCK || nr_flips[i]++ >= SLOT_FLIPS)
		return;
	nr_all_flips++;
	if (bit < 64)
		atomic_fetch_xor(&region->slots[i], 1ULL << bit);
	else
		atomic_fetch_xor(&region->words[2 * i + bit % 2], 1ULL << bit / 2 % 64);
}

static void flip_arena(uint32_t at, uint32_t bit)
{
	struct region *region = store->region;
	uint32_t nr = region_nr_touched(region);
	uint32_t c = nr ? at / region->chunk_bytes % nr : 0;

	/* READY chunks are the keeper's, and nobody looks at them until they are used. */
	if (!nr ||
	    (region->chunks[c].state != CHUNK_USED && region->chunks[c].state != CHUNK_WHOLE))
		return;
	nr_all_flips++;
	region->arena[(uint64_t)c * region->chunk_words + at / 4 % region->chunk_words] ^=
		1U << bit % 32;
}

/* Half of all flips in headers, where they matter most. */
static void flip_header(uint32_t nth, uint32_t bit)
{
	struct arena_block b = {.place = 0};
	int rv;

	if (store->region->chunks[0].state != CHUNK_USED)
		return;
	for (uint32_t n = 0; (rv = arena_walk(&store->arena, 0, &b)) > 0 && n < nth % 64; n++)
		b.place += b.words;
	if (rv > 0)
		flip_arena((uint32_t)b.place * 4 + bit / 32 % 4 * 4, bit);
}

static void step(const uint8_t *op)
{
	uint64_t i = op[1] % NR_PAGES;
	uint32_t more = op[2] | (uint32_t)op[3] << 8;
	char message[160];

	switch (op[0] % 16) {
	case 0:
		store_compact(store, UINT64_MAX);
		break;
	case 1:
		require(store_rebuild(store) >= 0, "a damaged store can be rebuilt");
		break;
	case 2:
		store_check(store, message);
		break;
	case 3:
		store_destroy(store);
		require(store_adopt(&store, fd) == 0, "a damaged region can be adopted");
		break;
	case 4:
	case 5:
		flip_slot(i, more % 192);
		break;
	case 6:
		flip_arena(more << 3 | op[1] % 8, op[1]);
		break;
	case 7:
	case 8:
		flip_header(op[1], more);
		break;
	case 9:
	case 10:
		discard(i, 1 + op[2] % 8);
		break;
	case 11:
		change(i, more % PAGE_BYTES, op[0]);
		break;
	default:
		write_page(i, op[2]);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint32_t chunk_sizes[] = {4096, 16384, 65536};
	struct store_options options = {.nr_pages = NR_PAGES};
	char message[160];
	uint32_t flags;

	if (size < 1)
		return 0;
	options.chunk_bytes = chunk_sizes[data[0] % 3];
	memset(model, 0, sizeof(model));
	memset(nr_flips, 0, sizeof(nr_flips));
	nr_all_flips = 0;
	fd = region_memory(&flags);
	require(fd >= 0 && store_create(&store, fd, &options) == 0, "a store can be made");
	for (uint64_t i = 0; i < NR_PAGES; i += 2)
		write_page(i, (uint8_t)(data[0] + i));
	for (size_t at = 1; at + OP_BYTES <= size; at += OP_BYTES) {
		step(data + at);
		compare();
	}
	require(store_rebuild(store) >= 0, "a damaged store can be rebuilt");
	compare();
	discard(0, NR_PAGES);
	require(store_rebuild(store) == 0, "without damaged pages nothing is damaged");
	require(store_check(store, message) == 0, message);
	compare();
	store_destroy(store);
	close(fd);
	return 0;
}
