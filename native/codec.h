/* SPDX-License-Identifier: MIT
 *
 * codec - one page in, its stored form out; knows no arena
 */
#ifndef CODEC_H
#define CODEC_H

#include <stdbool.h>
#include <stdint.h>

#define CODEC_PAGE_BYTES 4096
#define CODEC_MAX_BYTES 3072 /* what does not get this small is kept raw */
#define CODEC_STATE_BYTES 16448

/** codec_same_filled - is @page one 64-bit word, repeated? It is stored in @word. */
bool codec_same_filled(const void *page, uint64_t *word);

/** codec_fill - write @word over a whole page. */
void codec_fill(void *page, uint64_t word);

/**
 * codec_compress - LZ4
 * @state: CODEC_STATE_BYTES bytes, 8-byte aligned; contents do not matter
 * @out:   CODEC_MAX_BYTES bytes
 *
 * Stops as soon as @out is full, so an incompressible page costs little.
 *
 * Return: length, 1 to CODEC_MAX_BYTES; 0: keep the page raw.
 */
uint32_t codec_compress(void *state, const void *page, void *out);

/**
 * codec_decompress - the reverse; safe with any input
 *
 * Return: 0, -EIO (not @length bytes of exactly one page).
 */
int codec_decompress(const void *in, uint32_t length, void *page);

/** codec_checksum - over a stored form, and @seed, which ties it to its slot and length. */
uint32_t codec_checksum(const void *in, uint32_t length, uint64_t seed);

#endif
