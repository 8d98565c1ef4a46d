/* SPDX-License-Identifier: MIT
 *
 * region_layout - a region's file: made, laid out, mapped; see region.h for the picture
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REGION_MAGIC "zswapfs"
#define REGION_ALIGN (2ULL << 20)
#define REGION_MAX_ARENA_BYTES (4ULL << SLOT_PLACE_BITS)
#define SPARE_CHUNKS 8 /* what the memory limit holds back for compaction */

static int noswap_tmpfs(void)
{
	int fd = -1;
	int mount = -1;
	int fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC);

	if (fs < 0)
		return -1;
	/* With huge pages, where an administrator made them the default, a touch would take 2 MiB, and
	 * a punch give nothing back. Kernels without them do not know the option. */
	syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "huge", "never", 0);
	if (syscall(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, "noswap", NULL, 0) ||
	    syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "size", "0", 0) ||
	    syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "mode", "0700", 0) ||
	    syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0))
		goto out;
	mount = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC,
			     MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	if (mount >= 0)
		fd = openat(mount, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
out:
	if (mount >= 0)
		close(mount);
	close(fs);
	return fd;
}

int region_memory(uint32_t *flags)
{
	int fd = noswap_tmpfs();

	*flags = fd >= 0 ? REGION_NOSWAP : 0;
	if (fd < 0)
		fd = memfd_create("zswapfs", MFD_CLOEXEC);
	return fd >= 0 ? fd : -errno;
}

static uint64_t align_up(uint64_t value, uint64_t to)
{
	return (value + to - 1) / to * to;
}

static bool options_valid(const struct store_options *o)
{
	return o->nr_pages >= 1 && o->nr_pages <= STORE_MAX_PAGES &&
	       o->chunk_bytes >= STORE_MIN_CHUNK_BYTES && o->chunk_bytes <= STORE_MAX_CHUNK_BYTES &&
	       (o->chunk_bytes & (o->chunk_bytes - 1)) == 0 &&
	       (o->mem_limit == 0 || o->mem_limit >= o->chunk_bytes);
}

/* Chunks for @o's pages if all of them are raw, a quarter more for holes, and the reserve. */
static uint64_t chunks_needed(const struct store_options *o)
{
	uint64_t raw_bytes = PAGE_BYTES + 12;
	uint64_t each = o->chunk_bytes < raw_bytes ? 1 : o->chunk_bytes / raw_bytes;
	uint64_t nr = o->nr_pages / each;
	uint64_t most = REGION_MAX_ARENA_BYTES / o->chunk_bytes;

	nr += nr / 4 + o->reserve_bytes / o->chunk_bytes + 2 * SPARE_CHUNKS;
	if (o->mem_limit && nr > o->mem_limit / o->chunk_bytes)
		nr = o->mem_limit / o->chunk_bytes;
	return nr < most ? nr : most;
}

static uint64_t map_words(uint64_t nr_pages)
{
	return (nr_pages + TABLE_SLOTS * 64 - 1) / (TABLE_SLOTS * 64);
}

/* FNV-1a: a changed byte always changes it. */
static uint64_t geometry_sum(const struct region_geometry *g)
{
	const uint8_t *bytes = (const uint8_t *)g;
	uint64_t sum = 0xcbf29ce484222325ULL;

	for (size_t i = 0; i < offsetof(struct region_geometry, sum); i++)
		sum = (sum ^ bytes[i]) * 0x100000001b3ULL;
	return sum;
}

int region_format(int fd, const struct store_options *o)
{
	struct region_geometry h = {.magic = REGION_MAGIC};

	if (!options_valid(o))
		return -EINVAL;
	h.format = REGION_FORMAT;
	h.chunk_bytes = o->chunk_bytes;
	h.nr_pages = o->nr_pages;
	h.mem_limit = o->mem_limit;
	h.reserve_bytes = o->reserve_bytes;
	h.nr_chunks = chunks_needed(o);
	h.map_off = align_up(sizeof(struct region_header), PAGE_BYTES);
	h.slot_off =
		align_up(h.map_off + 2 * map_words(o->nr_pages) * sizeof(uint64_t), PAGE_BYTES);
	h.word_off = align_up(h.slot_off + o->nr_pages * sizeof(slot_t), PAGE_BYTES);
	h.chunk_off = align_up(h.word_off + o->nr_pages * 2 * sizeof(uint64_t), PAGE_BYTES);
	h.arena_off = align_up(h.chunk_off + h.nr_chunks * sizeof(struct chunk), REGION_ALIGN);
	h.total_bytes = h.arena_off + h.nr_chunks * h.chunk_bytes;
	h.sum = geometry_sum(&h);
	if (ftruncate(fd, 0) || ftruncate(fd, (off_t)h.total_bytes))
		return -errno;
	if (pwrite(fd, &h, sizeof(h), offsetof(struct region_header, geometry)) < 0 ||
	    pwrite(fd, &h, sizeof(h), offsetof(struct region_header, geometry_copy)) < 0)
		return -errno;
	return 0;
}

/* Not a region that this version can read, from what its first bytes say. */
static int geometry_refused(const struct region_geometry *g)
{
	if (!memcmp(g->magic, REGION_MAGIC, sizeof(g->magic)) && g->format != REGION_FORMAT)
		return -EPROTONOSUPPORT;
	return -EINVAL;
}

static bool geometry_valid(const struct region_geometry *g)
{
	return !memcmp(g->magic, REGION_MAGIC, sizeof(g->magic)) && g->format == REGION_FORMAT &&
	       g->sum == geometry_sum(g);
}

static int geometry_read(int fd, struct region_geometry *g)
{
	static const off_t places[] = {offsetof(struct region_header, geometry_copy),
				       offsetof(struct region_header, geometry)};
	struct stat st;

	for (int i = 0; i < 2; i++) {
		memset(g, 0, sizeof(*g));
		if (pread(fd, g, sizeof(*g), places[i]) < 0)
			return -EINVAL;
		if (!geometry_valid(g))
			continue;
		return !fstat(fd, &st) && (uint64_t)st.st_size == g->total_bytes ? 0 : -EINVAL;
	}
	return geometry_refused(g);
}

int region_probe(int fd)
{
	struct region_geometry g;

	return geometry_read(fd, &g);
}

/* The reserve's size in chunks and the caps that follow from the memory limit. */
static void set_limits(struct region *region, const struct region_geometry *h)
{
	uint64_t reserve = h->reserve_bytes / h->chunk_bytes;

	region->max_used = (uint32_t)h->nr_chunks;
	region->reserve = (uint32_t)(reserve ? reserve : 1);
	region->spare = region->max_used / 8;
	if (region->spare > SPARE_CHUNKS)
		region->spare = SPARE_CHUNKS;
}

static uint32_t place_bits(const struct region_geometry *h)
{
	uint64_t nr_words = h->nr_chunks * (h->chunk_bytes / 4);

	return 64 - (uint32_t)__builtin_clzll(nr_words - 1);
}

static void init_locks(struct region *region)
{
	pthread_condattr_t monotonic;

	pthread_mutex_init(&region->keeping, NULL);
	pthread_mutex_init(&region->lock, NULL);
	pthread_cond_init(&region->work, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&region->change, &monotonic);
	pthread_condattr_destroy(&monotonic);
}

int region_map(struct region **out, int fd)
{
	struct region_geometry h;
	struct region *region;
	char *base;
	int rv = geometry_read(fd, &h);

	if (rv)
		return rv;
	region = calloc(1, sizeof(*region));
	if (!region)
		return -ENOMEM;
	region->ahead = calloc(map_words(h.nr_pages), sizeof(*region->ahead));
	base = region->ahead ? mmap(NULL, h.total_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
			     : MAP_FAILED;
	if (base == MAP_FAILED) {
		free(region->ahead);
		free(region);
		return -ENOMEM;
	}
	madvise(base, h.total_bytes, MADV_DONTDUMP);
	region->geometry = h;
	region->header = (struct region_header *)base;
	region->map = (_Atomic uint64_t *)(base + h.map_off);
	region->map_copy = region->map + map_words(h.nr_pages);
	region->slots = (slot_t *)(base + h.slot_off);
	region->words = (_Atomic uint64_t *)(base + h.word_off);
	region->chunks = (struct chunk *)(base + h.chunk_off);
	region->arena = (uint32_t *)(base + h.arena_off);
	region->nr_chunks = (uint32_t)h.nr_chunks;
	region->chunk_bytes = h.chunk_bytes;
	region->chunk_words = h.chunk_bytes / 4;
	region->chunk_shift = (uint32_t)__builtin_ctz(region->chunk_words);
	region->place_bits = place_bits(&h);
	region->fd = fd;
	region->ready = region->holes = region->stale = CHUNK_NONE;
	region_mend(region);
	set_limits(region, &h);
	init_locks(region);
	*out = region;
	return 0;
}

void region_mend(struct region *region)
{
	struct region_header *h = region->header;

	h->geometry = h->geometry_copy = region->geometry;
	for (uint64_t n = 0; n < map_words(region->geometry.nr_pages); n++) {
		if (region->map[n] == region->map_copy[n])
			continue;
		region->map[n] |= region->map_copy[n];
		region->map_copy[n] |= region->map[n];
	}
}
