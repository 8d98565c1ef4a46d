/* SPDX-License-Identifier: MIT
 *
 * memory - of a process alone, there before a lane needs it
 */
#ifndef MEMORY_H
#define MEMORY_H

#include <stddef.h>

/**
 * memory_populate - have pages in memory and mapped for writing, their content unchanged
 *
 * MAP_POPULATE does not do it: under MCL_ONFAULT the kernel takes it for the locking's own
 * populating, and leaves it out.
 *
 * Context: others may write there meanwhile.
 */
void memory_populate(void *at, size_t bytes);

/**
 * memory_map - get zeroed pages that are populated and not in core dumps
 *
 * Return: they, to be given back with munmap(), or NULL.
 */
void *memory_map(size_t bytes);

/** memory_touch_stack - have the next 64 KiB of the caller's stack in memory */
void memory_touch_stack(void);

#endif
