/* SPDX-License-Identifier: MIT
 *
 * codec - see codec.h
 *
 * The capacity given to LZ4 is the raw threshold: it stops as soon as that is full and returns 0.
 * Its table is cleared for each page: LZ4 skips that only for inputs below 4 KiB.
 */
#include "codec.h"

#include <errno.h>
#include <lz4.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

_Static_assert(CODEC_STATE_BYTES >= sizeof(LZ4_stream_t), "LZ4's state must fit");

bool codec_same_filled(const void *page, uint64_t *word)
{
	const char *bytes = page;

	memcpy(word, bytes, sizeof(*word));
	/* The last word is compared first: most pages that begin with equal words differ there. */
	return memcmp(bytes + CODEC_PAGE_BYTES - 8, word, 8) == 0 &&
	       memcmp(bytes, bytes + 8, CODEC_PAGE_BYTES - 8) == 0;
}

void codec_fill(void *page, uint64_t word)
{
	char *bytes = page;

	if (word == 0) {
		memset(bytes, 0, CODEC_PAGE_BYTES);
		return;
	}
	for (int i = 0; i < CODEC_PAGE_BYTES; i += 8)
		memcpy(bytes + i, &word, 8);
}

uint32_t codec_compress(void *state, const void *page, void *out)
{
	return (uint32_t)LZ4_compress_fast_extState(state, page, out, CODEC_PAGE_BYTES,
						    CODEC_MAX_BYTES, 1);
}

int codec_decompress(const void *in, uint32_t length, void *page)
{
	int bytes = LZ4_decompress_safe(in, page, (int)length, CODEC_PAGE_BYTES);

	return bytes == CODEC_PAGE_BYTES ? 0 : -EIO;
}

uint32_t codec_checksum(const void *in, uint32_t length, uint64_t seed)
{
	uint64_t hash = XXH3_64bits(in, length);

	/* An odd multiplier spreads the seed upwards; both halves count. */
	hash ^= (seed + 1) * 0x9e3779b97f4a7c15ULL;
	return (uint32_t)(hash ^ hash >> 32);
}
