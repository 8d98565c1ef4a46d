/* SPDX-License-Identifier: MIT
 *
 * bench_load - work on more memory than there is, verified, with the time of each fault
 *
 *     bench_load PAGES-FILE MIB FIT-MIB LOAD...
 *
 * Runs inside a memory cgroup of about FIT-MIB; contrib/bench/swap starts it. Each LOAD prints one
 * line of JSON:
 *
 *     fill     touch MIB for the first time; what fits is not measured
 *     random   read a quarter as many pages, in random order
 *     seqread  read half of the pages, in order, from where the last such load ended
 *     rewrite  change half of the pages, likewise
 *     four     four processes, each on a quarter, read and change pages in random order
 *     forks    processes that read and change some pages of their parent's, fill some of their
 *              own, and end
 *
 * The work is fixed, not the time: what a load finds in memory is then the same for all.
 *
 * Page i of generation g holds page (7919 i + 31 g) of a sample of PAGES-FILE, but its first word
 * is g << 32 | i. Every touch verifies the whole page: a tenth of a microsecond.
 *
 * Only touches that had a major fault count for latency (for fill: all). Time and getrusage()
 * tell: a touch that took longer than a microsecond is looked at.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <stdbool.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define PAGE BENCH_PAGE_BYTES
#define MIB_PAGES ((1 << 20) / PAGE)
#define SAMPLE_PAGES 1024 /* of the corpus; they are locked, and take 4 MiB of what fits */
#define SLOW_NS 1000
#define NR_WORKERS 4
#define CHILD_PAGES 512 /* that a short-lived process reads, changes, and has of its own */
#define NR_CHILDREN 2	/* alive at a time */

/* Latencies: 32 buckets for each doubling, so 3 % wide. */
#define BUCKET_BITS 5
#define NR_BUCKETS (64 << BUCKET_BITS)

/* What processes of one load count together. */
struct shared {
	uint64_t pages;
	uint64_t wrong;
	uint64_t ready;
	uint64_t begun;
	uint32_t histogram[NR_BUCKETS];
};

struct memory {
	char *pages;
	uint64_t nr;
	uint16_t *generation;
	uint64_t cursor; /* of the loads that go in order */
};

/* The whole system's, but for swap nobody else uses. */
struct totals {
	uint64_t ns;
	double cpu_seconds;
	double stolen_seconds;
	uint64_t swapped_in;
	uint64_t swapped_out;
};

static struct shared *shared;
static char *sample;
static uint64_t nr_sample;
static uint64_t chance;
static long faults_before; /* this process's, at the last look */

static uint64_t any(uint64_t n)
{
	chance = chance * 6364136223846793005ULL + 1442695040888963407ULL;
	return (uint64_t)(((__uint128_t)chance * n) >> 64);
}

static void add(uint64_t *to, uint64_t n)
{
	__atomic_fetch_add(to, n, __ATOMIC_RELAXED);
}

static uint32_t bucket_of(uint64_t ns)
{
	uint32_t shift;

	if (ns < 1 << BUCKET_BITS)
		return (uint32_t)ns;
	shift = (uint32_t)(63 - __builtin_clzll(ns)) - BUCKET_BITS;
	return ((shift + 1) << BUCKET_BITS) + (uint32_t)((ns >> shift) & ((1 << BUCKET_BITS) - 1));
}

static double bucket_ns(uint32_t bucket)
{
	uint32_t shift = bucket >> BUCKET_BITS;
	uint64_t low = bucket & ((1 << BUCKET_BITS) - 1);

	if (!shift)
		return (double)low;
	return ((double)low + (1 << BUCKET_BITS) + 0.5) * (double)(1ULL << (shift - 1));
}

static const char *content(uint64_t index, uint64_t generation)
{
	return sample + (7919 * index + 31 * generation) % nr_sample * PAGE;
}

static void put(struct memory *m, uint64_t index)
{
	uint64_t word = (uint64_t)m->generation[index] << 32 | index;
	char *page = m->pages + index * PAGE;

	memcpy(page + 8, content(index, m->generation[index]) + 8, PAGE - 8);
	memcpy(page, &word, 8);
}

static long major_faults(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_majflt;
}

static void note(uint64_t since, bool always)
{
	uint64_t took = now_ns(CLOCK_MONOTONIC) - since;
	long faults;

	if (!always) {
		if (took < SLOW_NS)
			return;
		faults = major_faults();
		if (faults == faults_before)
			return;
		faults_before = faults;
	}
	__atomic_fetch_add(&shared->histogram[bucket_of(took)], 1, __ATOMIC_RELAXED);
}

static void touch(struct memory *m, uint64_t index, bool change)
{
	uint64_t expected = (uint64_t)m->generation[index] << 32 | index;
	uint64_t *word = (uint64_t *)(void *)(m->pages + index * PAGE);
	uint64_t since = now_ns(CLOCK_MONOTONIC);
	uint64_t found = change ? __atomic_fetch_add(word, 1ULL << 32, __ATOMIC_RELAXED)
				: __atomic_load_n(word, __ATOMIC_RELAXED);

	note(since, false);
	if (found != expected ||
	    memcmp(word + 1, content(index, m->generation[index]) + 8, PAGE - 8) != 0)
		add(&shared->wrong, 1);
	if (change) {
		m->generation[index]++;
		put(m, index);
	}
}

static struct memory memory_map(uint64_t nr)
{
	struct memory m = {.nr = nr, .generation = calloc(nr, sizeof(*m.generation))};

	m.pages = mmap(NULL, nr * PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	must(m.pages != MAP_FAILED && m.generation, "mmap");
	must(!madvise(m.pages, nr * PAGE, MADV_NOHUGEPAGE), "MADV_NOHUGEPAGE");
	must(!mlock(m.generation, nr * sizeof(*m.generation)), "mlock");
	return m;
}

static void memory_unmap(struct memory *m)
{
	if (!m->pages)
		return;
	munmap(m->pages, m->nr * PAGE);
	munlock(m->generation, m->nr * sizeof(*m->generation));
	free(m->generation);
	*m = (struct memory){0};
}

static double stat_seconds(const char *line, int from, int upto)
{
	unsigned long long v[8] = {0};
	double sum = 0;

	sscanf(line, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &v[0], &v[1], &v[2], &v[3],
	       &v[4], &v[5], &v[6], &v[7]);
	for (int i = from; i <= upto; i++)
		if (i != 3 && i != 4) /* idle and iowait */
			sum += (double)v[i];
	return sum / (double)sysconf(_SC_CLK_TCK);
}

static struct totals totals_now(void)
{
	struct totals now = {.ns = now_ns(CLOCK_MONOTONIC)};
	char line[512];
	FILE *file = fopen("/proc/stat", "re");

	must(file && fgets(line, sizeof(line), file), "/proc/stat");
	now.cpu_seconds = stat_seconds(line, 0, 6);
	now.stolen_seconds = stat_seconds(line, 7, 7);
	fclose(file);
	file = fopen("/proc/vmstat", "re");
	must(file != NULL, "/proc/vmstat");
	while (fgets(line, sizeof(line), file)) {
		if (!strncmp(line, "pswpin ", 7))
			now.swapped_in = strtoull(line + 7, NULL, 10);
		else if (!strncmp(line, "pswpout ", 8))
			now.swapped_out = strtoull(line + 8, NULL, 10);
	}
	fclose(file);
	return now;
}

static double percentile(double share, uint64_t nr)
{
	uint64_t seen = 0;

	for (uint32_t i = 0; i < NR_BUCKETS; i++) {
		seen += shared->histogram[i];
		if (seen && (double)seen >= share * (double)nr)
			return bucket_ns(i) / 1000;
	}
	return 0;
}

static void report(const char *load, const struct totals *before)
{
	struct totals now = totals_now();
	uint64_t nr = 0;

	for (uint32_t i = 0; i < NR_BUCKETS; i++)
		nr += shared->histogram[i];
	printf("{\"load\": \"%s\", \"pages\": %llu, \"wrong\": %llu, \"seconds\": %.6f"
	       ", \"cpu_seconds\": %.3f, \"stolen_seconds\": %.3f, \"swapped_in\": %llu"
	       ", \"swapped_out\": %llu, \"faults\": %llu, \"p50_us\": %.1f, \"p99_us\": %.1f"
	       ", \"p99.9_us\": %.1f}\n",
	       load, (unsigned long long)shared->pages, (unsigned long long)shared->wrong,
	       (double)(now.ns - before->ns) / 1e9, now.cpu_seconds - before->cpu_seconds,
	       now.stolen_seconds - before->stolen_seconds,
	       (unsigned long long)(now.swapped_in - before->swapped_in),
	       (unsigned long long)(now.swapped_out - before->swapped_out), (unsigned long long)nr,
	       percentile(0.5, nr), percentile(0.99, nr), percentile(0.999, nr));
	fflush(stdout);
}

/* Put every page for the first time; measure those from @from on. */
static struct totals fill(struct memory *m, uint64_t from)
{
	struct totals before = totals_now();

	for (uint64_t i = 0; i < m->nr; i++) {
		uint64_t since;

		if (i == from) {
			memset(shared, 0, sizeof(*shared));
			before = totals_now();
		}
		since = now_ns(CLOCK_MONOTONIC);
		__atomic_store_n(m->pages + i * PAGE, 1, __ATOMIC_RELAXED);
		note(since, true);
		put(m, i);
	}
	shared->pages = m->nr - from;
	return before;
}

static void touch_in_order(struct memory *m, uint64_t n, bool change)
{
	for (uint64_t i = 0; i < n; i++, m->cursor++)
		touch(m, m->cursor % m->nr, change);
	add(&shared->pages, n);
}

/* Change one page in @change_one_in, or none. */
static void touch_at_random(struct memory *m, uint64_t n, uint64_t change_one_in)
{
	for (uint64_t i = 0; i < n; i++)
		touch(m, any(m->nr), change_one_in && i % change_one_in == 0);
	add(&shared->pages, n);
}

static struct totals begin(void)
{
	struct totals before;

	memset(shared->histogram, 0, sizeof(shared->histogram));
	shared->pages = shared->wrong = 0;
	faults_before = major_faults();
	before = totals_now();
	__atomic_store_n(&shared->begun, 1, __ATOMIC_RELEASE);
	return before;
}

static void worker_main(uint64_t number, uint64_t nr_pages)
{
	struct memory m = memory_map(nr_pages);

	chance = number + 1;
	for (uint64_t i = 0; i < nr_pages; i++)
		put(&m, i);
	add(&shared->ready, 1);
	while (!__atomic_load_n(&shared->begun, __ATOMIC_ACQUIRE))
		usleep(1000);
	faults_before = major_faults();
	touch_at_random(&m, nr_pages / 4, 2);
	_exit(0);
}

static void reap(void)
{
	int status;

	must(wait(&status) > 0, "wait");
	if (!WIFEXITED(status) || WEXITSTATUS(status)) {
		fprintf(stderr, "a process of the load was killed\n");
		exit(1);
	}
}

static void load_four(uint64_t nr_pages)
{
	struct totals before;

	memset(shared, 0, sizeof(*shared));
	for (uint64_t i = 0; i < NR_WORKERS; i++) {
		pid_t pid = fork();

		must(pid >= 0, "fork");
		if (!pid)
			worker_main(i, nr_pages / NR_WORKERS);
	}
	while (__atomic_load_n(&shared->ready, __ATOMIC_RELAXED) < NR_WORKERS)
		usleep(1000);
	before = begin();
	for (int i = 0; i < NR_WORKERS; i++)
		reap();
	report("four", &before);
}

static void child_main(struct memory *m, uint64_t number)
{
	struct memory own = memory_map(CHILD_PAGES);
	uint64_t at;

	chance = number;
	faults_before = 0;
	at = any(m->nr - 2 * CHILD_PAGES);
	for (uint64_t i = 0; i < CHILD_PAGES; i++) {
		touch(m, at + i, false);
		touch(m, at + CHILD_PAGES + i, true);
		put(&own, i);
	}
	add(&shared->pages, 3 * CHILD_PAGES);
	_exit(0);
}

static void load_forks(struct memory *m)
{
	struct totals before = begin();
	uint64_t alive = 0;

	for (uint64_t number = 1; number <= m->nr / (4 * 3 * CHILD_PAGES) + 1; number++) {
		pid_t pid = fork();

		must(pid >= 0, "fork");
		if (!pid)
			child_main(m, number);
		if (++alive == NR_CHILDREN) {
			reap();
			alive--;
		}
	}
	for (; alive; alive--)
		reap();
	report("forks", &before);
}

static void run_load(const char *load, struct memory *m, uint64_t nr, uint64_t fit)
{
	struct totals before;

	if (!strcmp(load, "fill") || !strcmp(load, "four"))
		memory_unmap(m);
	if (!strcmp(load, "four")) {
		load_four(nr);
		return;
	}
	if (!m->pages) {
		*m = memory_map(nr);
		before = fill(m, fit);
	}
	if (!strcmp(load, "forks")) {
		load_forks(m);
		return;
	}
	if (strcmp(load, "fill") != 0)
		before = begin();
	if (!strcmp(load, "random"))
		touch_at_random(m, nr / 4, 0);
	else if (strcmp(load, "fill") != 0)
		touch_in_order(m, nr / 2, !strcmp(load, "rewrite"));
	report(load, &before);
}

/* Pages from all over the file, where no reclaim gets them. */
static void take_sample(const char *name)
{
	uint64_t nr;
	const char *pages = map_pages(name, &nr);

	nr_sample = nr < SAMPLE_PAGES ? nr : SAMPLE_PAGES;
	sample = malloc(nr_sample * PAGE);
	must(sample != NULL, "malloc");
	for (uint64_t i = 0; i < nr_sample; i++)
		memcpy(sample + i * PAGE, pages + i * (nr / nr_sample) * PAGE, PAGE);
	must(!mlock(sample, nr_sample * PAGE), "mlock");
}

int main(int argc, char **argv)
{
	struct memory m = {0};
	uint64_t nr;
	uint64_t fit;

	if (argc < 5)
		return 2;
	take_sample(argv[1]);
	nr = strtoull(argv[2], NULL, 10) * MIB_PAGES;
	fit = strtoull(argv[3], NULL, 10) * MIB_PAGES;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		      0);
	must(shared != MAP_FAILED && fit < nr && nr >= 4ULL * CHILD_PAGES, "memory");
	must(!mlock(shared, sizeof(*shared)), "mlock");
	for (int i = 4; i < argc; i++)
		run_load(argv[i], &m, nr, fit);
	return 0;
}
