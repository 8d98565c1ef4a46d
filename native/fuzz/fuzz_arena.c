/* SPDX-License-Identifier: MIT
 *
 * Fuzzes the arena: an input is a chunk size (1 byte), then operations of 3 bytes, what and how
 * much. Every block is filled with its owner's number and compared when it is freed; arena_check()
 * looks at all of it every few steps and at the end.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arena.h"

#define NR_BLOCKS 200
#define CHECK_EVERY 16

struct held {
	uint64_t place;
	uint32_t bytes; /* 0: not allocated */
};

struct world {
	struct region *region;
	struct arena arena;
	struct held held[NR_BLOCKS];
};

static const uint32_t chunk_sizes[] = {4096, 8192, 16384, 65536};

static void require(bool condition, const char *what)
{
	if (condition)
		return;
	fprintf(stderr, "%s\n", what);
	abort();
}

static void check(struct world *w)
{
	char message[160];

	require(arena_check(&w->arena, message) == 0, message);
}

static void allocate(struct world *w, uint32_t n, uint32_t bytes)
{
	struct region_patience patience = {0};
	struct held *held = &w->held[n];
	int rv;

	do {
		arena_lock(&w->arena);
		rv = arena_alloc(&w->arena, bytes, n, false, &held->place);
		arena_unlock(&w->arena);
	} while (rv == -EAGAIN && !region_wait_ready(w->region, false, &patience));
	require(rv == 0 || rv == -ENOSPC, "arena_alloc() gives room or says that there is none");
	if (rv)
		return;
	held->bytes = bytes;
	memset(arena_payload(&w->arena, held->place), (int)n, bytes);
}

static void release(struct world *w, uint32_t n)
{
	struct held *held = &w->held[n];
	const uint8_t *payload = arena_payload(&w->arena, held->place);

	require(arena_holds(&w->arena, held->place, held->bytes), "a block is held");
	require(arena_tag(&w->arena, held->place)->owner == n, "a block keeps its owner");
	for (uint32_t i = 0; i < held->bytes; i++)
		require(payload[i] == (uint8_t)n, "a block keeps its content");
	arena_wipe(&w->arena, held->place, held->bytes);
	arena_lock(&w->arena);
	require(arena_free(&w->arena, held->place) == 0, "a sound block can be freed");
	arena_unlock(&w->arena);
	held->bytes = 0;
}

/* Isolate the chunk of a block, or take it back where it is isolated. */
static void toggle_isolation(struct world *w, uint32_t n)
{
	uint32_t chunk = arena_chunk_of(&w->arena, w->held[n].place);

	if (!w->held[n].bytes || w->region->chunks[chunk].state != CHUNK_USED)
		return;
	arena_lock(&w->arena);
	if (w->region->chunks[chunk].flags & CHUNK_ISOLATED)
		arena_unisolate(&w->arena, chunk);
	else
		require(arena_isolate(&w->arena, chunk) == 0, "a sound chunk can be isolated");
	arena_unlock(&w->arena);
}

static void step(struct world *w, const uint8_t *op)
{
	uint32_t n = op[0] % NR_BLOCKS;
	uint32_t bytes = 1 + (op[1] | (uint32_t)op[2] << 8) % PAGE_BYTES;

	if (op[2] >= 0xf0)
		toggle_isolation(w, n);
	else if (w->held[n].bytes)
		release(w, n);
	else
		allocate(w, n, bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct world w;
	struct store_options options = {.nr_pages = 64, .mem_limit = 512 << 10};
	uint32_t flags;
	int fd;

	if (size < 1)
		return 0;
	options.chunk_bytes = chunk_sizes[data[0] % 4];
	options.reserve_bytes = 2 * options.chunk_bytes;
	memset(&w, 0, sizeof(w));
	fd = region_memory(&flags);
	require(fd >= 0 && !region_format(fd, &options) && !region_map(&w.region, fd) &&
			!region_start_keeper(w.region),
		"a region can be made");
	arena_init(&w.arena, w.region);
	for (size_t at = 1; at + 3 <= size; at += 3) {
		step(&w, data + at);
		if (at / 3 % CHECK_EVERY == 0)
			check(&w);
	}
	check(&w);
	for (uint32_t n = 0; n < NR_BLOCKS; n++)
		if (w.held[n].bytes)
			release(&w, n);
	check(&w);
	require(w.arena.nr_chunks == 0, "an empty arena has no chunks");
	region_destroy(w.region);
	arena_fini(&w.arena);
	close(fd);
	return 0;
}
