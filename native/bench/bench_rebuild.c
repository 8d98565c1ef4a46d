/* SPDX-License-Identifier: MIT
 *
 * bench_rebuild - how long the next worker needs until it knows where all pages are
 *
 *     bench_rebuild NR-PAGES
 *
 * Pages of about 1.2 KiB compressed, written in random order and half of them once more, so that
 * a slot's neighbours have blocks anywhere. Prints one JSON object.
 */
#include "bench.h"

#include "store.h"

static void make_page(uint64_t *page, uint64_t n)
{
	for (int i = 0; i < 150; i++)
		page[i] = (n * 150 + (uint64_t)i) * 0x9e3779b97f4a7c15ULL;
}

static void fill(struct store *store)
{
	static uint64_t page[PAGE_BYTES / 8];
	uint64_t nr = store->nr_pages;

	for (uint64_t i = 0; i < nr + nr / 2; i++) {
		make_page(page, i);
		/* An odd factor: each page once. */
		must(store_write(store, i * 0x9e3779b1ULL % nr, 1, page) == 1, "store_write");
	}
}

int main(int argc, char **argv)
{
	struct store_options options = {.reserve_bytes = 4 << 20, .chunk_bytes = 65536};
	struct store *store = NULL;
	struct store_stats stats;
	uint64_t began, took;
	uint32_t flags;
	int fd;

	if (argc != 2)
		return 2;
	options.nr_pages = strtoull(argv[1], NULL, 10);
	fd = region_memory(&flags);
	must(fd >= 0 && !store_create(&store, fd, &options), "store_create");
	fill(store);
	store_destroy(store);
	began = now_ns(CLOCK_MONOTONIC);
	must(!store_adopt(&store, fd), "store_adopt");
	took = now_ns(CLOCK_MONOTONIC) - began;
	store_get_stats(store, &stats);
	printf("{\"pages\": %llu, \"seconds\": %.3f}\n", (unsigned long long)stats.pages_stored,
	       (double)took / 1e9);
	store_destroy(store);
	return 0;
}
