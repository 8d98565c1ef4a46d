/* SPDX-License-Identifier: MIT
 *
 * fixture - stores and regions for tests, and the kernel calls they make, which a test can fail
 */
#ifndef FIXTURE_H
#define FIXTURE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pages.h"
#include "store.h"

#define KIB 1024ULL
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)

/* Sanitizers keep shadows of memory: page faults, and mappings larger than a walk can be. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define IS_SANITIZED 1
#endif
#endif
#ifndef IS_SANITIZED
#define IS_SANITIZED 0
#endif

#define ARRAY_SIZE(array) (sizeof(array) / sizeof(*(array)))

/* assert_int_equal() and so on print no more than two numbers. */
#define assert_that(condition, ...)                                                                \
	do {                                                                                       \
		if (!(condition))                                                                  \
			fail_msg(__VA_ARGS__);                                                     \
	} while (0)

static inline int open_memory(void)
{
	uint32_t flags;
	int fd = region_memory(&flags);

	assert_true(fd >= 0);
	return fd;
}

static inline struct store *open_store(int fd, uint64_t nr_pages, uint32_t chunk_bytes,
				       uint64_t mem_limit, uint64_t reserve_bytes)
{
	struct store_options options = {.nr_pages = nr_pages,
					.mem_limit = mem_limit,
					.reserve_bytes = reserve_bytes,
					.chunk_bytes = chunk_bytes};
	struct store *store;

	assert_int_equal(store_create(&store, fd, &options), 0);
	return store;
}

static inline void assert_sound(struct store *store)
{
	char message[160];

	assert_that(store_check(store, message) == 0, "store_check: %s", message);
}

static inline struct store_stats stats_of(struct store *store)
{
	struct store_stats stats;

	assert_int_equal(store_get_stats(store, &stats), 0);
	return stats;
}

static inline int wait_ready(struct region *region, bool compacting)
{
	return region_wait_ready(region, compacting, &(struct region_patience){0});
}

static inline uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

#endif
