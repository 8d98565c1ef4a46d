/* SPDX-License-Identifier: MIT
 *
 * journal - see journal.h
 */
#include "journal.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "region.h"

void journal_put_init(struct journal *journal, const void *message, size_t bytes)
{
	memcpy(journal->init, message, bytes);
	journal->init_sum = XXH3_64bits(message, bytes);
	/* Last: before, a worker that dies leaves none. */
	__atomic_store_n(&journal->init_bytes, (uint32_t)bytes, __ATOMIC_RELEASE);
}

int journal_get_init(const struct journal *journal, uint8_t message[JOURNAL_INIT_BYTES])
{
	uint32_t bytes = __atomic_load_n(&journal->init_bytes, __ATOMIC_ACQUIRE);

	if (!bytes)
		return 0;
	if (bytes > JOURNAL_INIT_BYTES)
		return -EUCLEAN;
	memcpy(message, journal->init, bytes);
	return XXH3_64bits(message, bytes) == journal->init_sum ? (int)bytes : -EUCLEAN;
}

int region_steps(int fd, uint64_t *steps)
{
	struct journal_lane lanes[SWITCH_MAX_LANES];
	off_t at = offsetof(struct region_header, journal) + offsetof(struct journal, lanes);

	if (pread(fd, lanes, sizeof(lanes), at) != sizeof(lanes))
		return -EINVAL;
	for (int i = 0; i < SWITCH_MAX_LANES; i++)
		steps[i] = lanes[i].steps;
	return 0;
}
