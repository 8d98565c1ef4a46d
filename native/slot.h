/* SPDX-License-Identifier: MIT
 *
 * slot - the 64-bit word that says where a page is
 *
 *   63    56 55                    18 17       6 5   4  3   2    0
 *  +--------+------------------------+----------+-----+----+-------+
 *  | check  | place (4-byte words)   | length-1 | age |lock| state |
 *  +--------+------------------------+----------+-----+----+-------+
 *
 * EMPTY: everything but lock and age is zero, so fresh memory is a table of empty pages.
 * SAME:  the 50 bits of place and length hold the repeated word when it has 32 bits, and 18 that
 *        follow from it: flipped state bits of a slot with a block must not pass for a word.
 * WORD0, WORD1: the repeated word is in the word table, which has two places for each slot, so
 *        that the old word stays until the slot has changed. Place and length hold 50 bits that
 *        follow from the word and are never all zero: a flip of the state bits leads to the other
 *        place, or to EMPTY, and what is there must not pass by chance.
 * LZ4, RAW: place is the block, in 4-byte words from the arena's start; length is in bytes. Bits
 *        that no place in this arena needs hold the tie: as many low bits of the block's checksum.
 *
 * check is a CRC-8 over state, length and place and over what the slot points to: the block's
 * checksum, or the word in the word table. With it a slot, a block and one write of the page
 * belong together. Polynomial 0x97 finds any three flipped bits in up to 119
 * (Koopman & Chakravarty, 'Cyclic Redundancy Code polynomial selection', 2004).
 *
 * A slot is changed by one atomic store, by the holder of its lock bit.
 */
#ifndef SLOT_H
#define SLOT_H

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef _Atomic uint64_t slot_t;

enum slot_state {
	SLOT_STATE_EMPTY = 0,
	SLOT_STATE_SAME = 1,
	SLOT_STATE_LZ4 = 2,
	SLOT_STATE_RAW = 3,
	SLOT_STATE_WORD0 = 4,
	SLOT_STATE_WORD1 = 5,
};

#define SLOT_STATE_MASK 7ULL
#define SLOT_LOCK (1ULL << 3)
#define SLOT_AGE_MASK (3ULL << 4)
#define SLOT_LENGTH_SHIFT 6
#define SLOT_LENGTH_BITS 12
#define SLOT_PLACE_SHIFT 18
#define SLOT_PLACE_BITS 38
#define SLOT_CHECK_SHIFT 56
#define SLOT_VALUE_BITS (SLOT_LENGTH_BITS + SLOT_PLACE_BITS)
#define SLOT_WORD_BITS 32 /* of a word that is in the slot itself */
#define SLOT_FIELDS (~0ULL >> (64 - SLOT_CHECK_SHIFT) & ~(SLOT_LOCK | SLOT_AGE_MASK))

extern const uint8_t slot_crc8_table[256];

static inline enum slot_state slot_state(uint64_t word)
{
	return (enum slot_state)(word & SLOT_STATE_MASK);
}

/* The tie above it included: see store_place(). */
static inline uint64_t slot_place(uint64_t word)
{
	return word >> SLOT_PLACE_SHIFT & ((1ULL << SLOT_PLACE_BITS) - 1);
}

static inline uint32_t slot_length(uint64_t word)
{
	return (uint32_t)(word >> SLOT_LENGTH_SHIFT & ((1U << SLOT_LENGTH_BITS) - 1)) + 1;
}

static inline bool slot_has_block(uint64_t word)
{
	return slot_state(word) == SLOT_STATE_LZ4 || slot_state(word) == SLOT_STATE_RAW;
}

static inline bool slot_has_word(uint64_t word)
{
	return slot_state(word) == SLOT_STATE_WORD0 || slot_state(word) == SLOT_STATE_WORD1;
}

static inline bool slot_is_same(uint64_t word)
{
	return slot_state(word) == SLOT_STATE_SAME || slot_has_word(word);
}

static inline uint64_t slot_mix(uint64_t value)
{
	return (value ^ value >> 32) * 0x9e3779b97f4a7c15ULL;
}

/* What a slot has in place and length for its word, where that is in the word table. */
static inline uint64_t slot_word_field(uint64_t value)
{
	return slot_mix(value) >> (64 - SLOT_VALUE_BITS) | 1;
}

static inline bool slot_word_fits(uint64_t value)
{
	return value >> SLOT_WORD_BITS == 0;
}

/* Likewise, where the word is there itself. */
static inline uint64_t slot_same_field(uint64_t value)
{
	return value | slot_mix(value) >> (64 - SLOT_VALUE_BITS + SLOT_WORD_BITS) << SLOT_WORD_BITS;
}

/* Where in the word table the word of slot @index in @state is. */
static inline uint64_t slot_word_at(uint64_t index, enum slot_state state)
{
	return 2 * index + (state == SLOT_STATE_WORD1);
}

/* What a slot without a block has in place and length. */
static inline uint64_t slot_field(uint64_t word)
{
	return word >> SLOT_LENGTH_SHIFT & ((1ULL << SLOT_VALUE_BITS) - 1);
}

/* The repeated word of a SAME slot. */
static inline uint64_t slot_value(uint64_t word)
{
	return slot_field(word) & ((1ULL << SLOT_WORD_BITS) - 1);
}

static inline uint8_t slot_crc8(uint8_t crc, uint64_t bits, int nr_bytes)
{
	while (nr_bytes--)
		crc = slot_crc8_table[crc ^ (uint8_t)(bits >> 8 * nr_bytes)];
	return crc;
}

/* Add the check over @fields and @target, what the slot points to (0 for EMPTY and SAME). */
static inline uint64_t slot_seal(uint64_t fields, uint64_t target)
{
	/* Closing the gap of lock and age leaves 53 + 64 bits, below the CRC's 119. */
	uint64_t packed = (fields & SLOT_STATE_MASK) | ((fields & SLOT_FIELDS) >> 3 & ~7ULL);
	uint8_t crc = slot_crc8(slot_crc8(0, packed, 7), target, 8);

	return (fields & SLOT_FIELDS) | (uint64_t)crc << SLOT_CHECK_SHIFT;
}

static inline bool slot_is_sealed(uint64_t word, uint64_t target)
{
	return slot_seal(word, target) == (word & ~(SLOT_LOCK | SLOT_AGE_MASK));
}

static inline uint64_t slot_make_block(enum slot_state state, uint64_t place, uint32_t length,
				       uint32_t checksum)
{
	return slot_seal((uint64_t)state | (uint64_t)(length - 1) << SLOT_LENGTH_SHIFT |
				 place << SLOT_PLACE_SHIFT,
			 checksum);
}

static inline void slot_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

static inline bool slot_trylock(slot_t *slot, uint64_t *word)
{
	*word = atomic_fetch_or_explicit(slot, SLOT_LOCK, memory_order_acquire);
	return !(*word & SLOT_LOCK);
}

/* Take the lock bit; returns the word as it was. Held for a page's encoding at the longest. */
static inline uint64_t slot_lock(slot_t *slot)
{
	uint64_t word;

	for (unsigned int tries = 0; !slot_trylock(slot, &word); tries++) {
		while (atomic_load_explicit(slot, memory_order_relaxed) & SLOT_LOCK) {
			if (tries++ < 200)
				slot_relax();
			else
				sched_yield();
		}
	}
	return word;
}

static inline void slot_unlock(slot_t *slot)
{
	atomic_fetch_and_explicit(slot, ~SLOT_LOCK, memory_order_release);
}

/* Store @word (without the lock bit) and so give up the lock. */
static inline void slot_swing(slot_t *slot, uint64_t word)
{
	atomic_store_explicit(slot, word, memory_order_release);
}

#endif
