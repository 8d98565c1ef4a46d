/* SPDX-License-Identifier: MIT
 *
 * plain_store - the store as a file has it, but it only keeps the bytes; stands in for store_io.c
 *
 * With the CMake option ZSWAPFS_PLAIN_STORE, for contrib/bench/swap: what is left is the transport
 * (swap, loop device, FUSE, switch), so this is the fastest that any store could be. Pages lie
 * uncompressed in one mapping, populated as they are touched. Punched bytes are not even zeroed:
 * swap never reads what it has discarded. Nothing else may use such a build.
 */
#define _GNU_SOURCE
#include "store.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

static char *bytes_of_file;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void map_file(void)
{
	/* Of the largest size: only what is touched costs anything. */
	void *where = mmap(NULL, (size_t)STORE_MAX_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	bytes_of_file = where == MAP_FAILED ? NULL : where;
}

static int64_t clip(const struct store *store, uint64_t offset, uint64_t length)
{
	uint64_t size = store->nr_pages * PAGE_BYTES;

	pthread_once(&once, map_file);
	if (!bytes_of_file)
		return -ENOMEM;
	if (offset >= size)
		return 0;
	return (int64_t)(length < size - offset ? length : size - offset);
}

int64_t store_pread(struct store *store, uint64_t offset, uint64_t length, void *bytes)
{
	int64_t rv = clip(store, offset, length);

	if (rv > 0)
		memcpy(bytes, bytes_of_file + offset, (size_t)rv);
	return rv;
}

int64_t store_pwrite(struct store *store, uint64_t offset, uint64_t length, const void *bytes)
{
	int64_t rv = clip(store, offset, length);

	if (rv > 0)
		memcpy(bytes_of_file + offset, bytes, (size_t)rv);
	return rv;
}

int store_punch(struct store *store, uint64_t offset, uint64_t length)
{
	(void)store;
	(void)offset;
	(void)length;
	return 0;
}
