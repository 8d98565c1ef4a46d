/* SPDX-License-Identifier: MIT
 *
 * Tests of codec.c and slot.h: what is stored of a page, and the word that says where.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <lz4.h>
#include <stdlib.h>

#include "codec.h"
#include "pages.h"
#include "slot.h"

static uint64_t codec_state[CODEC_STATE_BYTES / 8];

/* A page that is one repeated word is recognised, whatever the word; one other bit is noticed. */
static void test_same_filled_pages_are_recognised(void **state)
{
	static const uint64_t words[] = {0,
					 1,
					 UINT64_MAX,
					 1ULL << 50,
					 (1ULL << 50) - 1,
					 0x0101010101010101,
					 0x8000000000000000,
					 0x1122334455667788};
	uint8_t page[CODEC_PAGE_BYTES];
	uint64_t word;

	(void)state;
	for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++) {
		codec_fill(page, words[i]);
		assert_true(codec_same_filled(page, &word));
		assert_true(word == words[i]);
		for (uint32_t at = 0; at < CODEC_PAGE_BYTES; at += 61) {
			page[at] ^= 0x10;
			assert_false(codec_same_filled(page, &word));
			page[at] ^= 0x10;
		}
		page[CODEC_PAGE_BYTES - 1] ^= 0x80;
		assert_false(codec_same_filled(page, &word));
	}
}

/* A page of equal bytes but an unequal period is not same-filled. */
static void test_periods_longer_than_a_word_are_not_same_filled(void **state)
{
	uint8_t page[CODEC_PAGE_BYTES];
	uint64_t word;

	(void)state;
	for (int period = 3; period <= 24; period++) {
		for (int i = 0; i < CODEC_PAGE_BYTES; i++)
			page[i] = (uint8_t)(i % period);
		assert_int_equal(codec_same_filled(page, &word), period == 4 || period == 8);
	}
}

/* What compresses comes back; what would be longer than the raw threshold is refused untouched. */
static void test_compression_round_trips_or_refuses(void **state)
{
	uint8_t page[CODEC_PAGE_BYTES], back[CODEC_PAGE_BYTES];
	uint8_t out[CODEC_MAX_BYTES + 16];
	uint32_t shortest = CODEC_MAX_BYTES, longest = 0, refused = 0;

	(void)state;
	for (uint64_t seed = 0; seed < 400; seed++) {
		uint32_t length;

		make_page(page, (enum page_kind)(PAGE_ALMOST_SAME + seed % 5), seed);
		memset(out, 0x5a, sizeof(out));
		length = codec_compress(codec_state, page, out);
		for (size_t i = CODEC_MAX_BYTES; i < sizeof(out); i++)
			assert_int_equal(out[i], 0x5a);
		if (!length) {
			refused++;
			continue;
		}
		assert_in_range(length, 1, CODEC_MAX_BYTES);
		assert_int_equal(codec_decompress(out, length, back), 0);
		assert_memory_equal(page, back, sizeof(page));
		shortest = length < shortest ? length : shortest;
		longest = length > longest ? length : longest;
	}
	assert_true(shortest < 64 && longest > CODEC_MAX_BYTES - 32 && refused > 80);
}

/* The result does not depend on what the state held. */
static void test_state_contents_do_not_matter(void **state)
{
	uint8_t page[CODEC_PAGE_BYTES];
	uint8_t one[CODEC_MAX_BYTES], two[CODEC_MAX_BYTES];
	uint32_t length;

	(void)state;
	make_page(page, PAGE_TEXT, 7);
	memset(codec_state, 0xff, sizeof(codec_state));
	length = codec_compress(codec_state, page, one);
	memset(codec_state, 0, sizeof(codec_state));
	assert_int_equal(codec_compress(codec_state, page, two), length);
	assert_memory_equal(one, two, length);
}

/* Input that is not one page's compressed form is EIO: cut off, bits flipped, noise. */
static void test_damaged_input_is_refused(void **state)
{
	uint8_t page[CODEC_PAGE_BYTES], back[CODEC_PAGE_BYTES], out[CODEC_MAX_BYTES];
	uint64_t seed = 1;
	uint32_t length;

	(void)state;
	make_page(page, PAGE_TEXT, 3);
	length = codec_compress(codec_state, page, out);
	for (uint32_t cut = 0; cut < length; cut++) {
		uint8_t *exact = malloc(cut + 1); /* so that ASan sees reads past the end */

		memcpy(exact + 1, out, cut);
		assert_int_equal(codec_decompress(exact + 1, cut, back), -EIO);
		free(exact);
	}
	for (int i = 0; i < 2000; i++) {
		uint8_t *noise = malloc(CODEC_MAX_BYTES);

		fill_random(noise, CODEC_MAX_BYTES, &seed);
		codec_decompress(noise, CODEC_MAX_BYTES, back);
		free(noise);
	}
	memset(out, 0, sizeof(out));
	assert_int_equal(codec_decompress(out, 1, back), -EIO);
}

/* A compressed form of fewer or more bytes than a page is not a page. */
static void test_other_sizes_are_refused(void **state)
{
	static const int sizes[] = {1, 100, 4095, 4097, 5000};
	uint8_t page[5000] = {0}, back[CODEC_PAGE_BYTES], out[CODEC_MAX_BYTES];

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
		int length = LZ4_compress_default((char *)page, (char *)out, sizes[i], sizeof(out));

		assert_true(length > 0);
		assert_int_equal(codec_decompress(out, (uint32_t)length, back), -EIO);
	}
}

/* The checksum depends on content, length and seed. */
static void test_checksum_covers_content_and_seed(void **state)
{
	uint8_t bytes[256];
	uint64_t random = 5;
	uint32_t sum;

	(void)state;
	fill_random(bytes, sizeof(bytes), &random);
	sum = codec_checksum(bytes, sizeof(bytes), 1);
	for (uint32_t bit = 0; bit < sizeof(bytes) * 8; bit++) {
		bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
		assert_int_not_equal(codec_checksum(bytes, sizeof(bytes), 1), sum);
		bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
	}
	for (int shift = 0; shift < 48; shift++)
		assert_int_not_equal(codec_checksum(bytes, sizeof(bytes), 1 ^ 1ULL << shift), sum);
	assert_int_not_equal(codec_checksum(bytes, sizeof(bytes) - 1, 1), sum);
}

/* Fields of a slot come back, up to the largest of each. */
static void test_slot_fields_come_back(void **state)
{
	static const uint64_t places[] = {0, 1, 4, 0xffffffff, (1ULL << SLOT_PLACE_BITS) - 1};
	static const uint32_t lengths[] = {1, 2, 3072, 4095, 4096};

	(void)state;
	for (int p = 0; p < 5; p++) {
		for (int l = 0; l < 5; l++) {
			uint64_t word = slot_make_block(SLOT_STATE_LZ4, places[p], lengths[l], 77);

			assert_true(slot_state(word) == SLOT_STATE_LZ4);
			assert_true(slot_place(word) == places[p]);
			assert_true(slot_length(word) == lengths[l]);
			assert_false(word & (SLOT_LOCK | SLOT_AGE_MASK));
			assert_true(slot_is_sealed(word, 77));
			assert_false(slot_is_sealed(word, 78));
			assert_true(slot_is_sealed(word | SLOT_LOCK | SLOT_AGE_MASK, 77));
		}
	}
	assert_true(slot_is_sealed(0, 0));
}

/* One or two flipped bits of the fields or of the checksum they cover break the seal. */
static void test_slot_seal_finds_two_flipped_bits(void **state)
{
	uint64_t word = slot_make_block(SLOT_STATE_RAW, 0x123456789, 4096, 0xdeadbeef);

	(void)state;
	for (int a = 0; a < 64 + 32; a++) {
		for (int b = a; b < 64 + 32; b++) {
			uint64_t bits = (a < 64 ? 1ULL << a : 0) | (b < 64 ? 1ULL << b : 0);
			uint64_t sum = 0xdeadbeef;

			if (bits & (SLOT_LOCK | SLOT_AGE_MASK))
				continue;
			sum ^= a >= 64 ? 1ULL << (a - 64) : 0;
			sum ^= b >= 64 && b != a ? 1ULL << (b - 64) : 0;
			assert_false(slot_is_sealed(word ^ bits, sum));
		}
	}
}

/* One or two flipped bits of a slot with a word in the word table, or of that word. */
static void test_word_seal_finds_two_flipped_bits(void **state)
{
	const uint64_t value = 0xfedcba9876543210;
	uint64_t word = slot_seal(SLOT_STATE_WORD1, value);

	(void)state;
	for (int a = 0; a < 128; a++) {
		for (int b = a; b < 128; b++) {
			uint64_t bits = (a < 64 ? 1ULL << a : 0) | (b < 64 ? 1ULL << b : 0);
			uint64_t target = value;

			if (bits & (SLOT_LOCK | SLOT_AGE_MASK))
				continue;
			target ^= a >= 64 ? 1ULL << (a - 64) : 0;
			target ^= b >= 64 && b != a ? 1ULL << (b - 64) : 0;
			assert_false(slot_is_sealed(word ^ bits, target));
		}
	}
}

/* Whoever has the lock bit has it alone; unlocking and swinging give it up. */
static void test_slot_lock_is_exclusive(void **state)
{
	slot_t slot = 0;
	uint64_t word;

	(void)state;
	assert_true(slot_lock(&slot) == 0);
	assert_false(slot_trylock(&slot, &word));
	slot_unlock(&slot);
	assert_true(slot_trylock(&slot, &word));
	slot_swing(&slot, SLOT_STATE_SAME | 5 << SLOT_LENGTH_SHIFT);
	word = slot_lock(&slot);
	assert_true(slot_value(word) == 5);
	slot_unlock(&slot);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_same_filled_pages_are_recognised),
		cmocka_unit_test(test_periods_longer_than_a_word_are_not_same_filled),
		cmocka_unit_test(test_compression_round_trips_or_refuses),
		cmocka_unit_test(test_state_contents_do_not_matter),
		cmocka_unit_test(test_damaged_input_is_refused),
		cmocka_unit_test(test_other_sizes_are_refused),
		cmocka_unit_test(test_checksum_covers_content_and_seed),
		cmocka_unit_test(test_slot_fields_come_back),
		cmocka_unit_test(test_slot_seal_finds_two_flipped_bits),
		cmocka_unit_test(test_word_seal_finds_two_flipped_bits),
		cmocka_unit_test(test_slot_lock_is_exclusive),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
