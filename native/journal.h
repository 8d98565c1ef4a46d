/* SPDX-License-Identifier: MIT
 *
 * journal - the part of the region's header that the switch writes: what the next worker needs of
 * this one, and how the supervisor sees that it hangs
 */
#ifndef JOURNAL_H
#define JOURNAL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "prelude.h"

#define JOURNAL_INIT_BYTES 256 /* Linux 6.18 sends 104 */

struct journal_lane {
	_Atomic uint64_t steps; /* odd: it has a request */
} __attribute__((aligned(64)));

struct journal {
	/* The kernel's INIT, which comes once in a mount. */
	uint64_t init_sum; /* of what is used of init */
	uint32_t init_bytes;
	uint8_t init[JOURNAL_INIT_BYTES] __attribute__((aligned(8)));
	struct journal_lane lanes[SWITCH_MAX_LANES];
};

/** journal_put_init - keep INIT. @bytes: <= JOURNAL_INIT_BYTES */
void journal_put_init(struct journal *journal, const void *message, size_t bytes);

/**
 * journal_get_init - copy INIT out
 *
 * Return: its length; 0: there was none yet; -EUCLEAN: it is damaged.
 */
int journal_get_init(const struct journal *journal, uint8_t message[JOURNAL_INIT_BYTES]);

/* A lane begins with a request, ends it, or goes on to another. The parity follows from what is
 * done, not from what was there: that is a dead worker's. */
static inline void journal_begin(struct journal_lane *lane)
{
	uint64_t steps = atomic_load_explicit(&lane->steps, memory_order_relaxed);

	atomic_store_explicit(&lane->steps, (steps + 2) | 1, memory_order_relaxed);
}

static inline void journal_end(struct journal_lane *lane)
{
	uint64_t steps = atomic_load_explicit(&lane->steps, memory_order_relaxed);

	atomic_store_explicit(&lane->steps, (steps + 2) & ~1ULL, memory_order_relaxed);
}

#endif
