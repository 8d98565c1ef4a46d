/* SPDX-License-Identifier: MIT
 *
 * bench_store - what the store costs, and bare LZ4 beside it
 *
 *     bench_store PAGES-FILE speed NR-PAGES          1 and 2 threads, the codec and the store
 *     bench_store PAGES-FILE scale FEW MANY          the same store with few and with many pages
 *     bench_store PAGES-FILE sparse FILE-PAGES NR    memory for a few pages of a large file
 *
 * Prints one JSON object. What is compared takes turns every few milliseconds, in an order that
 * rotates, so that a noisy neighbour hits all of it alike. contrib/bench/store runs it.
 *
 * The codec is LZ4 itself, with the store's raw threshold as capacity, into a buffer that is used
 * again and again; its compressed pages lie in one array as large as the store's arena.
 */
#include "bench.h"

#include <lz4.h>
#include <semaphore.h>
#include <string.h>

#include "store.h"

#define BATCH 32	 /* pages a call: what reclaim sends */
#define SLICE_BATCHES 16 /* a thread's share of one turn: 512 pages, some milliseconds */
#define SLICE (BATCH * SLICE_BATCHES)
#define MAX_THREADS 2
#define SCALE_PAGES 2048 /* single pages a turn */
#define SCALE_TURNS 64

struct bench {
	struct store *store;
	const char *corpus;
	uint64_t nr_corpus; /* whole batches */
	uint64_t nr_pages;
	char *packed; /* compressed forms of all pages, in order */
	uint64_t *packed_at;
};

struct desk {
	uint64_t state[CODEC_STATE_BYTES / 8];
	char out[BATCH * PAGE_BYTES];
};

typedef void (*job_t)(const struct bench *, struct desk *, uint64_t index);

/* Two threads: the caller and one more, which sleeps unless a turn is for both. */
struct team {
	const struct bench *bench;
	struct desk *desks[MAX_THREADS];
	pthread_t other;
	sem_t wake;
	_Atomic bool here; /* the other is awake, and spins until it may begin */
	_Atomic bool begin;
	_Atomic bool done;
	job_t job; /* NULL: go home */
	uint64_t index;
};

static const char *pages_of(const struct bench *b, uint64_t index)
{
	return b->corpus + index % b->nr_corpus * PAGE_BYTES;
}

static int pack(struct desk *desk, const char *page)
{
	return LZ4_compress_fast_extState(desk->state, page, desk->out, PAGE_BYTES, CODEC_MAX_BYTES,
					  1);
}

static void do_compress(const struct bench *b, struct desk *desk, uint64_t index)
{
	const char *pages = pages_of(b, index);

	for (uint64_t i = 0; i < BATCH; i++)
		pack(desk, pages + i * PAGE_BYTES);
}

static void do_decompress(const struct bench *b, struct desk *desk, uint64_t index)
{
	for (uint64_t i = 0; i < BATCH; i++) {
		const char *from = b->packed + b->packed_at[index + i];
		int length = (int)(b->packed_at[index + i + 1] - b->packed_at[index + i]);
		char *to = desk->out + i * PAGE_BYTES;

		if (length == PAGE_BYTES)
			memcpy(to, from, PAGE_BYTES);
		else
			must(LZ4_decompress_safe(from, to, length, PAGE_BYTES) == PAGE_BYTES,
			     "LZ4");
	}
}

static void do_write(const struct bench *b, struct desk *desk, uint64_t index)
{
	(void)desk;
	must(store_write(b->store, index, BATCH, pages_of(b, index)) == BATCH, "store_write");
}

static void do_read(const struct bench *b, struct desk *desk, uint64_t index)
{
	must(store_read(b->store, index, BATCH, desk->out) == BATCH, "store_read");
}

static void do_discard(const struct bench *b, struct desk *desk, uint64_t index)
{
	(void)desk;
	must(store_discard(b->store, index, BATCH) == BATCH, "store_discard");
}

static void run_slice(const struct team *team, uint32_t number)
{
	for (uint64_t i = 0; i < SLICE; i += BATCH)
		team->job(team->bench, team->desks[number], team->index + number * SLICE + i);
}

static void *other_main(void *arg)
{
	struct team *team = arg;

	for (;;) {
		while (sem_wait(&team->wake))
			;
		if (!team->job)
			return NULL;
		atomic_store(&team->here, true);
		while (!atomic_load(&team->begin))
			;
		run_slice(team, 1);
		atomic_store(&team->done, true);
	}
}

/*
 * Return the nanoseconds that @nr_threads took for a slice each, from page @index on. Waking the
 * other thread is not counted; nobody spins beside a single one.
 */
static uint64_t turn(struct team *team, job_t job, uint32_t nr_threads, uint64_t index)
{
	uint64_t since;

	team->job = job;
	team->index = index;
	if (nr_threads > 1) {
		atomic_store(&team->here, false);
		atomic_store(&team->begin, false);
		atomic_store(&team->done, false);
		sem_post(&team->wake);
		while (!atomic_load(&team->here))
			;
	}
	since = now_ns(CLOCK_MONOTONIC);
	atomic_store(&team->begin, true);
	run_slice(team, 0);
	while (nr_threads > 1 && !atomic_load(&team->done))
		;
	return now_ns(CLOCK_MONOTONIC) - since;
}

static void team_start(struct team *team, const struct bench *bench)
{
	*team = (struct team){.bench = bench};
	for (int i = 0; i < MAX_THREADS; i++) {
		team->desks[i] = malloc(sizeof(struct desk));
		must(team->desks[i] != NULL, "malloc");
		memset(team->desks[i], 1, sizeof(struct desk));
	}
	must(!sem_init(&team->wake, 0, 0), "sem_init");
	must(!pthread_create(&team->other, NULL, other_main, team), "pthread_create");
}

static void team_end(struct team *team)
{
	team->job = NULL;
	sem_post(&team->wake);
	pthread_join(team->other, NULL);
	for (int i = 0; i < MAX_THREADS; i++)
		free(team->desks[i]);
}

/*
 * Codec and store, one thread and two, over all pages. Each turn of all four takes three slices:
 * one for one thread, two for two threads; codec and store work on the same pages.
 */
static void phase(struct team *team, const char *name, job_t codec, job_t store)
{
	const job_t jobs[4] = {codec, store, codec, store};
	uint64_t ns[4] = {0};
	uint64_t nr_turns = team->bench->nr_pages / (3 * SLICE);
	double pages = (double)(nr_turns * SLICE);

	for (uint64_t i = 0; i < nr_turns; i++) {
		for (uint64_t j = 0; j < 4; j++) {
			uint64_t which = (i + j) % 4;
			uint64_t at = i * 3 * SLICE + (which < 2 ? 0 : SLICE);

			if (jobs[which])
				ns[which] += turn(team, jobs[which], which < 2 ? 1 : 2, at);
		}
	}
	printf(", \"%s\": {\"store_1\": %.0f, \"store_2\": %.0f", name, pages / (double)ns[1] * 1e9,
	       2 * pages / (double)ns[3] * 1e9);
	if (codec)
		printf(", \"codec_1\": %.0f, \"codec_2\": %.0f", pages / (double)ns[0] * 1e9,
		       2 * pages / (double)ns[2] * 1e9);
	printf("}");
}

static void pack_all(struct bench *b)
{
	static struct desk desk;
	uint64_t at = 0;

	b->packed = malloc(b->nr_pages * PAGE_BYTES);
	b->packed_at = malloc((b->nr_pages + 1) * sizeof(*b->packed_at));
	must(b->packed && b->packed_at, "malloc");
	for (uint64_t i = 0; i < b->nr_pages; i++) {
		const char *page = pages_of(b, i);
		int length = pack(&desk, page);

		b->packed_at[i] = at;
		memcpy(b->packed + at, length ? desk.out : page,
		       length ? (size_t)length : PAGE_BYTES);
		at += length ? (uint64_t)length : PAGE_BYTES;
	}
	b->packed_at[b->nr_pages] = at;
}

static struct store *new_store(uint64_t nr_pages)
{
	struct store_options options = {
		.nr_pages = nr_pages, .reserve_bytes = 4 << 20, .chunk_bytes = 65536};
	struct store *store = NULL;
	uint32_t flags;
	int fd = region_memory(&flags);

	must(fd >= 0 && !store_create(&store, fd, &options), "store_create");
	region_settle(store->region);
	return store;
}

static void speed(struct bench *b)
{
	struct team team;

	pack_all(b);
	b->store = new_store(b->nr_pages);
	team_start(&team, b);
	printf("{\"pages\": %llu", (unsigned long long)b->nr_pages);
	phase(&team, "write", do_compress, do_write);
	phase(&team, "read", do_decompress, do_read);
	phase(&team, "rewrite", do_compress, do_write);
	phase(&team, "discard", NULL, do_discard);
	printf("}\n");
	team_end(&team);
	store_destroy(b->store);
}

/* Nanoseconds for @n pages of @store: in order from @first on, or at random. */
static uint64_t singles(struct bench *b, struct store *store, uint64_t first, uint64_t n,
			const char *what)
{
	static char page[PAGE_BYTES];
	uint64_t since = now_ns(CLOCK_MONOTONIC);

	for (uint64_t i = 0; i < n; i++) {
		uint64_t at = (uint64_t)(drand48() * (double)store->nr_pages);
		const char *from = pages_of(b, first + i);

		if (*what == 'r')
			must(store_read(store, at, 1, page) == 1, "store_read");
		else
			must(store_write(store, *what == 'f' ? first + i : at, 1, from) == 1,
			     "store_write");
	}
	return now_ns(CLOCK_MONOTONIC) - since;
}

static void scale(struct bench *b, uint64_t few, uint64_t many)
{
	struct store *stores[2] = {new_store(few), new_store(many)};
	const char *const whats[] = {"read", "write"};
	uint64_t ns[2] = {0};

	/* Each store in slices, the small one's spread over the large one's time. */
	for (uint64_t i = 0, j = 0; i < many; i += SCALE_PAGES) {
		uint64_t n = many - i < SCALE_PAGES ? many - i : SCALE_PAGES;
		uint64_t upto = (i + n) * few / many;

		ns[1] += singles(b, stores[1], i, n, "fill");
		ns[0] += singles(b, stores[0], j, upto - j, "fill");
		j = upto;
	}
	printf("{\"few\": %llu, \"many\": %llu", (unsigned long long)few, (unsigned long long)many);
	printf(", \"fill\": {\"few_ns\": %.0f, \"many_ns\": %.0f}", (double)ns[0] / (double)few,
	       (double)ns[1] / (double)many);
	for (uint32_t w = 0; w < 2; w++) {
		ns[0] = ns[1] = 0;
		for (uint64_t turn = 0; turn < 2 * SCALE_TURNS; turn++)
			ns[turn & 1] += singles(b, stores[turn & 1], turn, SCALE_PAGES, whats[w]);
		printf(", \"%s\": {\"few_ns\": %.0f, \"many_ns\": %.0f}", whats[w],
		       (double)ns[0] / (SCALE_TURNS * SCALE_PAGES),
		       (double)ns[1] / (SCALE_TURNS * SCALE_PAGES));
	}
	printf("}\n");
	store_destroy(stores[0]);
	store_destroy(stores[1]);
}

static void sparse(struct bench *b, uint64_t file_pages, uint64_t nr)
{
	struct store *store = new_store(file_pages);
	struct store_stats empty;
	struct store_stats full;

	store_get_stats(store, &empty);
	for (uint64_t i = 0; i < nr; i++)
		must(store_write(store, i * (file_pages / nr), 1, pages_of(b, i)) == 1,
		     "store_write");
	store_get_stats(store, &full);
	printf("{\"file_pages\": %llu, \"pages\": %llu, \"empty_table_bytes\": %llu"
	       ", \"table_bytes\": %llu, \"arena_bytes\": %llu, \"compr_bytes\": %llu}\n",
	       (unsigned long long)file_pages, (unsigned long long)nr,
	       (unsigned long long)empty.table_bytes, (unsigned long long)full.table_bytes,
	       (unsigned long long)full.mem_used_bytes, (unsigned long long)full.compr_bytes);
	store_destroy(store);
}

/* What the kernel would send: without pages of one repeated word, which cost nothing. */
static void load_corpus(struct bench *b, const char *name)
{
	uint64_t nr;
	const char *pages = map_pages(name, &nr);
	char *kept = malloc(nr * PAGE_BYTES);
	uint64_t word;

	must(kept != NULL, "malloc");
	for (uint64_t i = 0; i < nr; i++)
		if (!codec_same_filled(pages + i * PAGE_BYTES, &word))
			memcpy(kept + b->nr_corpus++ * PAGE_BYTES, pages + i * PAGE_BYTES,
			       PAGE_BYTES);
	b->nr_corpus = b->nr_corpus / BATCH * BATCH;
	must(b->nr_corpus > 0, "too few pages");
	b->corpus = kept;
}

int main(int argc, char **argv)
{
	struct bench b = {0};

	if (argc == 4 && !strcmp(argv[2], "speed")) {
		load_corpus(&b, argv[1]);
		b.nr_pages = strtoull(argv[3], NULL, 10) / (3 * SLICE) * (3 * SLICE);
		must(b.nr_pages > 0, "too few pages");
		speed(&b);
	} else if (argc == 5 && !strcmp(argv[2], "scale")) {
		load_corpus(&b, argv[1]);
		scale(&b, strtoull(argv[3], NULL, 10), strtoull(argv[4], NULL, 10));
	} else if (argc == 5 && !strcmp(argv[2], "sparse")) {
		load_corpus(&b, argv[1]);
		sparse(&b, strtoull(argv[3], NULL, 10), strtoull(argv[4], NULL, 10));
	} else {
		return 2;
	}
	return 0;
}
