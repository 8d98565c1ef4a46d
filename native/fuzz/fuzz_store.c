/* SPDX-License-Identifier: MIT
 *
 * Fuzzes the store against plain bytes: an input is a chunk size and a limit (1 byte each), then
 * operations of 6 bytes: what, where (2), how much (2), and a seed for the content. Partial and
 * whole pages, holes, compaction, rebuilding, and adopting the region as another process would.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pages.h"
#include "store.h"

#define NR_PAGES 24
#define SIZE (NR_PAGES * PAGE_BYTES)
#define MAX_BYTES (5 * PAGE_BYTES)
#define OP_BYTES 6

static uint8_t model[SIZE];
static struct store *store;
static int fd;
static bool limited;

static void require(bool condition, const char *what)
{
	if (condition)
		return;
	fprintf(stderr, "%s\n", what);
	abort();
}

static void compare(void)
{
	static uint8_t now[SIZE];
	char message[160];

	require(store_check(store, message) == 0, message);
	require(store_read(store, 0, NR_PAGES, now) == NR_PAGES, "every page is readable");
	require(!memcmp(now, model, SIZE), "every page is right");
}

static void write_bytes(uint32_t at, uint32_t bytes, uint8_t seed)
{
	static uint8_t content[MAX_BYTES + PAGE_BYTES];
	int64_t rv;

	for (uint32_t i = 0; i < bytes; i += PAGE_BYTES)
		make_page(content + i, (seed + i / PAGE_BYTES) % NR_PAGE_KINDS, seed);
	rv = store_pwrite(store, at, bytes, content);
	if (at + bytes > SIZE) {
		require(rv == -EFBIG, "nothing is written past the end");
		return;
	}
	require(rv == bytes || limited, "there is room without a limit");
	require(rv == -ENOSPC || (rv > 0 && rv <= bytes), "a write is stored, in part, or not");
	if (rv > 0)
		memcpy(model + at, content, (size_t)rv);
}

static void punch(uint32_t at, uint32_t bytes)
{
	uint32_t end = at + bytes < SIZE ? at + bytes : SIZE;
	int rv = store_punch(store, at, bytes);

	if (rv) {
		require(limited && rv == -ENOSPC, "holes can be made");
		require(store_pread(store, 0, SIZE, model) == SIZE, "a part of them was");
		return;
	}
	if (at < end)
		memset(model + at, 0, end - at);
}

static void adopt(void)
{
	store_destroy(store);
	require(store_adopt(&store, fd) == 0, "a region can be adopted");
}

static void step(const uint8_t *op)
{
	uint32_t at = (uint32_t)(op[1] | op[2] << 8) * 3 % (SIZE + 100);
	uint32_t bytes = 1 + (uint32_t)(op[3] | op[4] << 8) % MAX_BYTES;

	switch (op[0] % 16) {
	case 0:
		store_compact(store, UINT64_MAX);
		return;
	case 1:
		require(store_rebuild(store) == 0, "rebuilding finds no damage");
		return;
	case 2:
		adopt();
		return;
	case 3:
	case 4:
	case 5:
		punch(at, bytes);
		return;
	case 6:
	case 7:
	case 8:
		write_bytes(at, bytes, op[5]);
		return;
	default:
		write_bytes(at / PAGE_BYTES * PAGE_BYTES, (bytes / PAGE_BYTES + 1) * PAGE_BYTES,
			    op[5]);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint32_t chunk_sizes[] = {4096, 16384, 65536};
	struct store_options options = {.nr_pages = NR_PAGES};
	uint32_t flags;

	if (size < 2)
		return 0;
	options.chunk_bytes = chunk_sizes[data[0] % 3];
	options.reserve_bytes = 2 * options.chunk_bytes;
	limited = data[1] % 2;
	if (limited)
		options.mem_limit = (2 + data[1] / 2 % 8) * (uint64_t)options.chunk_bytes;
	memset(model, 0, SIZE);
	fd = region_memory(&flags);
	require(fd >= 0 && store_create(&store, fd, &options) == 0, "a store can be made");
	for (size_t at = 2; at + OP_BYTES <= size; at += OP_BYTES) {
		step(data + at);
		if (at / OP_BYTES % 8 == 0)
			compare();
	}
	compare();
	store_destroy(store);
	close(fd);
	return 0;
}
