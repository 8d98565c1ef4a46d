/* SPDX-License-Identifier: MIT
 *
 * What lanes and compaction work with is in memory before they begin, in a process whose memory is
 * locked as a worker's is.
 */
#include "fixture.h"
#include "memory.h"
#include "seam.h"
#include "switch.h"

#include <sys/eventfd.h>

/* Sanitizers make mlockall() do nothing. */
static int lock_memory(void **state)
{
	(void)state;
	if (syscall(SYS_mlockall, MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
		print_message("memory cannot be locked here: %s\n", strerror(errno));
	return 0;
}

static void assert_resident(const void *memory, size_t bytes)
{
	const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	uintptr_t from = (uintptr_t)memory / page * page;
	size_t nr = ((uintptr_t)memory + bytes - from + page - 1) / page;
	unsigned char *pages = malloc(nr);

	assert_int_equal(mincore((void *)from, nr * page, pages), 0);
	for (size_t i = 0; i < nr; i++)
		assert_that(pages[i] & 1, "page %zu of %zu is not there", i, nr);
	free(pages);
}

/* With the kernel's advice and without. */
static void test_mapped_memory_is_there(void **state)
{
	(void)state;
	for (int error = 0; error <= EINVAL; error += EINVAL) {
		size_t bytes = 3 * MIB + PAGE_BYTES;
		char *memory;

		seam_set(&advise_seam, 0, error ? 1 : 0, error);
		memory = memory_map(bytes);
		assert_non_null(memory);
		assert_resident(memory, bytes);
		memset(memory, 7, bytes);
		memory_populate(memory, bytes);
		assert_int_equal(memory[bytes - 1], 7);
		munmap(memory, bytes);
	}
}

static void test_desks_are_there(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 1000, 65536, 0, MIB);

	(void)state;
	assert_resident(store->scratch, REGION_NR_COUNTERS * sizeof(*store->scratch));
	assert_resident(store->compaction, MIB / 2);
	store_destroy(store);
	close(fd);
}

static void test_buffers_are_there(void **state)
{
	int fd = open_memory();
	struct store *store = open_store(fd, 1000, 65536, 0, MIB);
	struct switch_options options = {.fuse_fd = -1,
					 .socket_fd = -1,
					 .end_fd = -1,
					 .latency_fd = -1,
					 .nr_lanes = 2,
					 .max_request_bytes = 256 * KIB};
	struct fuse_switch *sw;

	(void)state;
	assert_int_equal(switch_create(&sw, store, &options), 0);
	assert_resident(sw->memory, sw->memory_bytes);
	switch_destroy(sw);
	store_destroy(store);
	close(fd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_mapped_memory_is_there),
		cmocka_unit_test(test_desks_are_there),
		cmocka_unit_test(test_buffers_are_there),
	};

	return cmocka_run_group_tests(tests, lock_memory, NULL);
}
