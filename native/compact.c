/* SPDX-License-Identifier: MIT
 *
 * compact - memory back to the OS
 */
#include "store.h"

int64_t store_compact(struct store *store, uint64_t max_bytes)
{
	uint64_t before = atomic_load(&store->region->header->pages_returned);

	(void)max_bytes;
	region_settle(store->region);
	return (int64_t)((atomic_load(&store->region->header->pages_returned) - before) *
			 PAGE_BYTES);
}
