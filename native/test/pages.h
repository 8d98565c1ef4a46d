/* SPDX-License-Identifier: MIT
 *
 * pages - pages of every kind that the codec tells apart, made from a seed; for tests and fuzzers
 */
#ifndef PAGES_H
#define PAGES_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define TEST_PAGE_BYTES 4096

enum page_kind {
	PAGE_ZERO,
	PAGE_WORD_50,	  /* same-filled; the word fits in a slot */
	PAGE_WORD_64,	  /* same-filled; it does not */
	PAGE_ALMOST_SAME, /* but for the last byte */
	PAGE_SPARSE,	  /* zeroes and a few bytes */
	PAGE_TEXT,	  /* compresses to anything between 100 bytes and the raw threshold */
	PAGE_THRESHOLD,	  /* about as long as the raw threshold */
	PAGE_RANDOM,	  /* kept raw */
	NR_PAGE_KINDS,
};

/* splitmix64 */
static inline uint64_t next_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ULL;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
	return z ^ z >> 31;
}

static inline uint64_t random_below(uint64_t *state, uint64_t end)
{
	return next_random(state) % end;
}

static inline void fill_random(void *bytes, uint32_t nr, uint64_t *state)
{
	uint8_t *to = bytes;

	for (uint32_t i = 0; i < nr; i++)
		to[i] = (uint8_t)(next_random(state) >> 32);
}

static inline void fill_word(void *page, uint64_t word)
{
	for (uint32_t i = 0; i < TEST_PAGE_BYTES; i += sizeof(word))
		memcpy((uint8_t *)page + i, &word, sizeof(word));
}

static inline void make_page(void *page, enum page_kind kind, uint64_t seed)
{
	uint64_t state = seed * NR_PAGE_KINDS + kind;
	uint8_t *bytes = page;

	memset(page, 0, TEST_PAGE_BYTES);
	switch (kind) {
	case PAGE_WORD_50:
		fill_word(page, next_random(&state) >> 14 | 1);
		break;
	case PAGE_WORD_64:
		fill_word(page, next_random(&state) | 1ULL << 63);
		break;
	case PAGE_ALMOST_SAME:
		fill_word(page, next_random(&state));
		bytes[TEST_PAGE_BYTES - 1] ^= 1;
		break;
	case PAGE_SPARSE:
		for (int i = 0; i < 8; i++)
			bytes[random_below(&state, TEST_PAGE_BYTES)] = (uint8_t)(i + 1);
		break;
	case PAGE_TEXT:
		fill_random(page, 1 + (uint32_t)random_below(&state, 3000), &state);
		break;
	case PAGE_THRESHOLD:
		fill_random(page, 3030 + (uint32_t)random_below(&state, 60), &state);
		break;
	case PAGE_RANDOM:
		fill_random(page, TEST_PAGE_BYTES, &state);
		break;
	case PAGE_ZERO:
	case NR_PAGE_KINDS:
		break;
	}
}

#endif
