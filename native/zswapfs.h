/* SPDX-License-Identifier: MIT
 *
 * What Python sees of the native core, and the source of the cffi declarations: plain C
 * declarations and integer #defines only, no conditionals and no includes. C files get it
 * through prelude.h.
 *
 * Functions return >= 0 on success and -errno on failure. Unless it says otherwise, a function
 * may be called from several threads at once.
 */

#define PAGE_BYTES 4096
#define STORE_MAX_PAGES 268435456 /* 1 TiB of content; what a slot's place can address */
#define STORE_MIN_CHUNK_BYTES 4096
#define STORE_MAX_CHUNK_BYTES 65536
#define REGION_FORMAT 4 /* version of the layout; a region of another version is refused */
#define SWITCH_MAX_LANES 64

/* Flags of region_memory(). */
#define REGION_NOSWAP 1 /* pages cannot be swapped out, locked or not */

/* States of a slot, as store_stored() gives them. */
#define SLOT_EMPTY 0
#define SLOT_SAME 1
#define SLOT_LZ4 2
#define SLOT_RAW 3

struct store;
struct fuse_switch;

struct store_options {
	uint64_t nr_pages;	/* size of the file in pages, 1 to STORE_MAX_PAGES */
	uint64_t mem_limit;	/* bytes; cap on the arena's memory, reserve included; 0: none */
	uint64_t reserve_bytes; /* populated chunks kept ahead */
	uint32_t chunk_bytes;	/* power of two, STORE_MIN_CHUNK_BYTES to STORE_MAX_CHUNK_BYTES */
};

/* Counted, never estimated. Units: pages of PAGE_BYTES and bytes as named. */
struct store_stats {
	uint64_t nr_pages;
	uint64_t mem_limit;
	uint64_t reads;		  /* pages of valid read requests */
	uint64_t writes;	  /* pages of valid write requests */
	uint64_t failed_reads;	  /* pages that did not decompress or match their checksum */
	uint64_t failed_writes;	  /* pages that could not be stored */
	uint64_t invalid_io;	  /* requests out of range, or malformed */
	uint64_t notify_free;	  /* discarded pages that held content */
	uint64_t discards;	  /* pages named by discards */
	uint64_t same_pages;	  /* pages held now as one repeated word */
	uint64_t pages_stored;	  /* pages held in the arena now */
	uint64_t good_pages;	  /* of these, at most half a page long */
	uint64_t raw_pages;	  /* of these, kept raw */
	uint64_t compr_bytes;	  /* sum of the stored lengths */
	uint64_t mem_used_bytes;  /* what the arena occupies, reserve not included */
	uint64_t mem_max_bytes;	  /* highest mem_used_bytes seen */
	uint64_t reserve_bytes;	  /* populated chunks held ready */
	uint64_t table_bytes;	  /* resident header, slot table, word table and chunk table */
	uint64_t pages_compacted; /* blocks moved */
	uint64_t pages_returned;  /* pages given back to the OS */
	uint64_t free_bytes;	  /* free bytes inside chunks that are in use */
	uint64_t nr_chunks;	  /* chunks in use */
};

/**
 * region_memory - make the nameless file that a region lives in
 * @flags: REGION_* of what was had is stored here
 *
 * A file on a private tmpfs that is mounted noswap; a memfd where the kernel has none.
 *
 * Return: a descriptor (close-on-exec), or -errno.
 */
int region_memory(uint32_t *flags);

/**
 * region_format - lay out an empty region in @fd
 *
 * Return: 0, -EINVAL (options), -errno of ftruncate.
 */
int region_format(int fd, const struct store_options *options);

/**
 * region_probe - could this version adopt what is in @fd?
 *
 * Return: 0, -EINVAL (not a region), -EPROTONOSUPPORT (another format).
 */
int region_probe(int fd);

/**
 * region_steps - how far each lane of a worker is
 * @steps: SWITCH_MAX_LANES numbers; odd: the lane has a request; it changes with each
 *
 * Return: 0, -EINVAL (not a region).
 */
int region_steps(int fd, uint64_t *steps);

/**
 * store_create - format @fd and open it as an empty store
 * @out: the store
 * @fd:  from region_memory(); stays the caller's, must outlive the store
 *
 * Starts the region's keeper thread, which populates the reserve.
 *
 * Return: 0, -EINVAL (options), -ENOMEM.
 */
int store_create(struct store **out, int fd, const struct store_options *options);

/**
 * store_adopt - open the store that @fd holds
 *
 * For a region that an earlier process left, however it ended: ends with store_rebuild().
 *
 * Return: 0, -EINVAL (not a region), -EPROTONOSUPPORT (another format), -ENOMEM.
 */
int store_adopt(struct store **out, int fd);

/** store_destroy - stop the keeper and unmap; nobody may be inside. NULL is ignored. */
void store_destroy(struct store *store);

/**
 * store_write - replace whole pages
 * @index: first page
 * @nr:    pages; [@index, @index+@nr-1] must be inside the file
 * @pages: @nr x PAGE_BYTES bytes; not retained
 *
 * A page that could not be stored keeps its previous content.
 *
 * Context: any thread. Takes slot locks in rising order, then the arena lock.
 * Return: pages stored, counted from @index (fewer than @nr: the next one could not be stored);
 * -EINVAL (range), -ENOSPC (nothing stored: memory limit, or no memory).
 */
int64_t store_write(struct store *store, uint64_t index, uint64_t nr, const void *pages);

/**
 * store_read - copy whole pages out
 * @pages: @nr x PAGE_BYTES bytes; undefined after an error
 *
 * Return: @nr, -EINVAL (range), -EIO (a page's block is damaged).
 */
int64_t store_read(struct store *store, uint64_t index, uint64_t nr, void *pages);

/**
 * store_discard - forget whole pages; they read as zeroes
 *
 * Return: pages that held content, -EINVAL (range).
 */
int64_t store_discard(struct store *store, uint64_t index, uint64_t nr);

/* The same on bytes, as the file has them: any offset and length. */

/** store_pread - Return: bytes read (0 at or past the end), -EINVAL (above 2^63), -EIO. */
int64_t store_pread(struct store *store, uint64_t offset, uint64_t length, void *bytes);

/** store_pwrite - Return: bytes written, -EFBIG (reaches past the end: nothing changed),
 * -ENOSPC, -EIO (old content of a partial page is damaged). */
int64_t store_pwrite(struct store *store, uint64_t offset, uint64_t length, const void *bytes);

/** store_punch - zero bytes; whole pages among them are discarded; what lies past the end is
 * ignored. Return: 0, -EINVAL (length 0, above 2^63), -EIO, -ENOSPC (partial pages). */
int store_punch(struct store *store, uint64_t offset, uint64_t length);

/** store_note_invalid - count one malformed request. */
void store_note_invalid(struct store *store);

/**
 * store_compact - give memory back to the OS
 * @max_bytes: stop after the round that won this much; UINT64_MAX: all that can be won
 *
 * Packs sparse chunks, in rounds of at most 4 MiB of moved content; ends by itself where a round
 * would win nothing, or when as much is won as was free at the start. Page requests go on meanwhile
 * and wait for one block's copy at the longest. One caller compacts at a time; others wait for it.
 *
 * Return: bytes that the arena occupies less than before, give or take the chunks that requests
 * took or freed meanwhile.
 */
int64_t store_compact(struct store *store, uint64_t max_bytes);

/**
 * store_watch - have @event_fd told when blocks have been freed
 * @event_fd:    eventfd, O_NONBLOCK; stays the caller's; -1: stop watching
 * @freed_bytes: 1 is added once this much has been freed from now on, or a write was refused
 *
 * Once only: watch again for the next time. What makes compaction worth a look without a clock.
 */
void store_watch(struct store *store, int event_fd, uint64_t freed_bytes);

/**
 * store_check - compare the slot table with blocks, chunks, free lists and counters
 * @message: at least 160 bytes; the first fault as one sentence, or empty
 *
 * Context: nobody else may be inside the store.
 * Return: 0, -EUCLEAN (a fault).
 */
int store_check(struct store *store, char *message);

/**
 * store_rebuild - recreate block headers, free lists, chunk table and counters from the slot table
 *
 * Blocks that no slot owns are gone afterwards; slots whose block is damaged stay and read as
 * -EIO. Clears slot locks that a dead process held.
 *
 * Context: nobody else may be inside the store.
 * Return: pages whose block is damaged, -ENOMEM.
 */
int64_t store_rebuild(struct store *store);

/** store_get_stats - Return: 0. */
int store_get_stats(struct store *store, struct store_stats *out);

/**
 * store_stored - copy the stored form of a page, for tests with another decoder
 * @bytes: at least PAGE_BYTES bytes; receives the block's payload, or the 8-byte word
 * @state: SLOT_* is stored here
 *
 * Return: bytes copied (0: empty), -EINVAL, -EIO.
 */
int64_t store_stored(struct store *store, uint64_t index, void *bytes, uint32_t *state);

struct switch_options {
	int fuse_fd;	   /* /dev/fuse, mounted, O_NONBLOCK */
	int socket_fd;	   /* our end of pyfuse3's SOCK_SEQPACKET pair */
	int end_fd;	   /* eventfd: 1 is added when the kernel has unmounted */
	int latency_fd;	   /* /dev/cpu_dma_latency, open for writing; -1: let CPUs sleep */
	uint32_t nr_lanes; /* 1 to SWITCH_MAX_LANES */
	uint32_t spin_us;  /* how long a lane looks for a request after a read before it sleeps */
	uint32_t max_request_bytes; /* max_write and max_read; multiple of PAGE_BYTES, <= 1 MiB */
	uint64_t swap_inode;	    /* node id of the swap file */
};

/**
 * switch_start - begin to serve: starts the lanes and the relay
 *
 * The descriptors stay the caller's and must outlive the switch. In a region that an earlier
 * worker served, first has the kernel send again what that one had under way, and replays INIT
 * to pyfuse3.
 *
 * Return: 0, -EINVAL, -ENOMEM, -EAGAIN (no thread).
 */
int switch_start(struct fuse_switch **out, struct store *store,
		 const struct switch_options *options);

/** switch_ready - Return: 1 when pyfuse3 has answered INIT, else 0. */
int switch_ready(const struct fuse_switch *sw);

/**
 * switch_join - wait until the kernel has unmounted, then free everything
 *
 * Return: 0, or -errno of what ended a lane other than the unmount.
 */
int switch_join(struct fuse_switch *sw);
