/* SPDX-License-Identifier: MIT
 *
 * bench - what the benchmarks in C share
 */
#ifndef BENCH_H
#define BENCH_H

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BENCH_PAGE_BYTES 4096

static inline uint64_t now_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

/* Say what is wrong and end: a benchmark that goes on without something measures something else. */
static inline void must(int good, const char *what)
{
	if (good)
		return;
	perror(what);
	exit(1);
}

/* Map a file of whole pages; its number of pages is stored in @nr. */
static inline const char *map_pages(const char *name, uint64_t *nr)
{
	struct stat st;
	const char *pages;
	int fd = open(name, O_RDONLY | O_CLOEXEC);

	must(fd >= 0 && !fstat(fd, &st) && st.st_size >= BENCH_PAGE_BYTES, name);
	pages = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
	must(pages != MAP_FAILED, name);
	close(fd);
	*nr = (uint64_t)st.st_size / BENCH_PAGE_BYTES;
	return pages;
}

#endif
