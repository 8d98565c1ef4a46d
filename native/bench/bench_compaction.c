/* SPDX-License-Identifier: MIT
 *
 * bench_compaction - what compaction costs, and what page requests feel of it
 *
 *     bench_compaction PAGES-FILE NR-PAGES speed|latency
 *
 * Fills a store with pages of the file, frees 59 % at random, and compacts in one thread; with
 * 'latency' another thread reads and writes random pages meanwhile, after it did so on a store
 * that nobody compacts. Prints one JSON object. contrib/bench/compaction runs it several times.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include "store.h"

#define MAX_SAMPLES 2000000
#define FREED 0.59
#define QUIET_SECONDS 1.0

struct samples {
	double *us;
	uint32_t nr;
};

static const char *corpus;
static uint64_t nr_corpus;
static _Atomic bool compacting;

static double seconds(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static const char *any_page(void)
{
	return corpus + (uint64_t)(drand48() * (double)nr_corpus) * PAGE_BYTES;
}

static void make_sparse(struct store *store)
{
	for (uint64_t i = 0; i < store->nr_pages; i++)
		if (store_write(store, i, 1, any_page()) != 1)
			exit(1);
	for (uint64_t i = 0; i < store->nr_pages; i++)
		if (drand48() < FREED)
			store_discard(store, i, 1);
	region_settle(store->region);
}

static void note(struct samples *samples, double since)
{
	if (samples->nr < MAX_SAMPLES)
		samples->us[samples->nr++] = (seconds(CLOCK_MONOTONIC) - since) * 1e6;
}

/* One read, one write, and as many discards as keep the store as full as it is. */
static void request(struct store *store, struct samples *reads, struct samples *writes)
{
	char page[PAGE_BYTES];
	uint64_t index = (uint64_t)(drand48() * (double)store->nr_pages);
	const char *from = any_page();
	double since = seconds(CLOCK_MONOTONIC);

	store_read(store, index, 1, page);
	note(reads, since);
	index = (uint64_t)(drand48() * (double)store->nr_pages);
	since = seconds(CLOCK_MONOTONIC);
	store_write(store, index, 1, from);
	note(writes, since);
	if (drand48() < FREED)
		store_discard(store, (uint64_t)(drand48() * (double)store->nr_pages), 1);
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a;
	double y = *(const double *)b;

	return (x > y) - (x < y);
}

static void print_samples(const char *name, struct samples *samples)
{
	qsort(samples->us, samples->nr, sizeof(double), compare);
	printf(", \"%s\": {\"n\": %u, \"p50\": %.2f, \"p99\": %.2f, \"p99.9\": %.2f, \"max\": "
	       "%.1f}",
	       name, samples->nr, samples->us[samples->nr / 2],
	       samples->us[(uint64_t)samples->nr * 99 / 100],
	       samples->us[(uint64_t)samples->nr * 999 / 1000], samples->us[samples->nr - 1]);
	samples->nr = 0;
}

static void *compact_main(void *arg)
{
	store_compact(arg, UINT64_MAX);
	atomic_store(&compacting, false);
	return NULL;
}

static void measure_latency(struct store *store)
{
	struct samples reads = {malloc(MAX_SAMPLES * sizeof(double)), 0};
	struct samples writes = {malloc(MAX_SAMPLES * sizeof(double)), 0};
	double end = seconds(CLOCK_MONOTONIC) + QUIET_SECONDS;
	pthread_t thread;

	while (seconds(CLOCK_MONOTONIC) < end)
		request(store, &reads, &writes);
	print_samples("read_quiet", &reads);
	print_samples("write_quiet", &writes);
	make_sparse(store);
	atomic_store(&compacting, true);
	pthread_create(&thread, NULL, compact_main, store);
	while (atomic_load(&compacting))
		request(store, &reads, &writes);
	pthread_join(thread, NULL);
	print_samples("read_compacting", &reads);
	print_samples("write_compacting", &writes);
}

static void measure_speed(struct store *store)
{
	double wall = seconds(CLOCK_MONOTONIC);
	double cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
	int64_t won = store_compact(store, UINT64_MAX);
	struct store_stats stats;

	wall = seconds(CLOCK_MONOTONIC) - wall;
	cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
	store_get_stats(store, &stats);
	printf(", \"won_bytes\": %lld, \"seconds\": %.6f, \"cpu_seconds\": %.6f, \"moved\": %llu"
	       ", \"ratio\": %.4f",
	       (long long)won, wall, cpu, (unsigned long long)stats.pages_compacted,
	       (double)stats.mem_used_bytes / (double)stats.compr_bytes);
}

int main(int argc, char **argv)
{
	struct store_options options = {.reserve_bytes = 4 << 20, .chunk_bytes = 65536};
	struct store *store;
	struct stat st;
	uint32_t flags;
	int fd;

	if (argc != 4)
		return 2;
	fd = open(argv[1], O_RDONLY);
	if (fd < 0 || fstat(fd, &st) || st.st_size < PAGE_BYTES)
		return 1;
	nr_corpus = (uint64_t)st.st_size / PAGE_BYTES;
	corpus = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
	options.nr_pages = strtoull(argv[2], NULL, 10);
	fd = region_memory(&flags);
	if (corpus == MAP_FAILED || fd < 0 || store_create(&store, fd, &options))
		return 1;
	make_sparse(store);
	printf("{\"pages\": %s", argv[2]);
	if (!strcmp(argv[3], "latency"))
		measure_latency(store);
	else
		measure_speed(store);
	printf("}\n");
	store_destroy(store);
	return 0;
}
