/* SPDX-License-Identifier: MIT
 *
 * memory - see memory.h
 */
#define _GNU_SOURCE
#include "memory.h"

#include <stdatomic.h>
#include <sys/mman.h>

#include "prelude.h"

#define TOUCHED_STACK_BYTES (64U << 10) /* the store's deepest call takes less than 4 KiB */

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* Write what is there, or leave it to whoever writes meanwhile. Compilers make a mere read of adding
 * nothing, which maps the zero page. */
static void touch(_Atomic char *byte)
{
	char value = atomic_load(byte);

	atomic_compare_exchange_strong(byte, &value, value);
}

void memory_populate(void *at, size_t bytes)
{
	if (madvise(at, bytes, MADV_POPULATE_WRITE) == 0)
		return;
	/* Before Linux 5.14; and where there is no memory somebody has to insist. */
	for (size_t i = 0; i < bytes; i += PAGE_BYTES)
		touch((_Atomic char *)at + i);
}

void *memory_map(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		return NULL;
	madvise(at, bytes, MADV_DONTDUMP);
	memory_populate(at, bytes);
	return at;
}

void __attribute__((noinline)) memory_touch_stack(void)
{
	volatile uint8_t stack[TOUCHED_STACK_BYTES];

	for (size_t i = 0; i < sizeof(stack); i += 1024)
		stack[i] = 0;
}
