/* SPDX-License-Identifier: MIT
 *
 * region_fixture - a region without a store, and chunks taken from it and given back
 */
#ifndef REGION_FIXTURE_H
#define REGION_FIXTURE_H

#include "fixture.h"
#include "seam.h"

#define CHUNK (64 * KIB)

struct fixture {
	int fd;
	struct region *region;
};

static inline struct region *open_region(struct fixture *f, uint64_t nr_pages, uint32_t chunk_bytes,
					 uint64_t mem_limit, uint64_t reserve_bytes)
{
	struct store_options options = {.nr_pages = nr_pages,
					.mem_limit = mem_limit,
					.reserve_bytes = reserve_bytes,
					.chunk_bytes = chunk_bytes};

	f->fd = open_memory();
	assert_int_equal(region_format(f->fd, &options), 0);
	assert_int_equal(region_map(&f->region, f->fd), 0);
	assert_int_equal(region_start_keeper(f->region), 0);
	return f->region;
}

static inline void close_region(struct fixture *f)
{
	region_destroy(f->region);
	close(f->fd);
	seam_reset();
}

static inline uint32_t nr_ready(struct region *region)
{
	uint32_t nr;

	pthread_mutex_lock(&region->lock);
	nr = region->nr_ready;
	pthread_mutex_unlock(&region->lock);
	return nr;
}

/* Wait until the keeper has populated @nr chunks. */
static inline void await_ready(struct region *region, uint32_t nr)
{
	uint64_t end = now_ns() + 10000000000;

	while (nr_ready(region) < nr) {
		assert_true(now_ns() < end);
		usleep(200);
	}
}

static inline uint64_t resident(const struct fixture *f)
{
	struct stat st;

	assert_int_equal(fstat(f->fd, &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

static inline uint32_t take(struct region *region)
{
	uint32_t c;
	int rv;

	while ((rv = region_take_chunk(region, false, &c)) == -EAGAIN)
		assert_int_equal(wait_ready(region, false), 0);
	assert_int_equal(rv, 0);
	return c;
}

static inline char *chunk_bytes_of(struct region *region, uint32_t c)
{
	return (char *)region->arena + (uint64_t)c * region->chunk_bytes;
}

/* Like a chunk that the arena used: not zero meanwhile, zero when it goes back. */
static inline void use(struct region *region, uint32_t c)
{
	char *bytes = chunk_bytes_of(region, c);

	for (uint32_t i = 0; i < region->chunk_bytes; i++)
		assert_int_equal(bytes[i], 0);
	memset(bytes, 0xa5, region->chunk_bytes);
}

static inline void give(struct region *region, uint32_t c)
{
	memset(chunk_bytes_of(region, c), 0, region->chunk_bytes);
	region_give_chunk(region, c);
}

#endif
