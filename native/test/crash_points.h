/* SPDX-License-Identifier: MIT
 *
 * crash_points - calls a function at each step of the code under test
 *
 * The core is compiled with -fsanitize-coverage=trace-pc for these tests: each basic block begins
 * with a call of __sanitizer_cov_trace_pc(). What another process would find in the region if
 * this one were killed there is what is in it now.
 */
#ifndef CRASH_POINTS_H
#define CRASH_POINTS_H

#include <stdint.h>
#include <string.h>

#ifdef __clang__
#define NOT_COUNTED __attribute__((no_sanitize("coverage")))
#else
#define NOT_COUNTED __attribute__((no_sanitize_coverage))
#endif

/* Of the thread that is watched; the callback itself, and other threads, are not. */
static _Thread_local void (*crash_point)(void *arg);
static _Thread_local void *crash_arg;
static uint64_t nr_crash_points;

/* A basic block counts as a step the first crash_repeats times only: loops are many alike. */
static struct {
	uintptr_t at;
	uint32_t nr;
} crash_seen[4096];
static uint32_t crash_repeats;

void __sanitizer_cov_trace_pc(void);

NOT_COUNTED static inline int crash_point_is_new(uintptr_t at)
{
	uintptr_t i = (at ^ at >> 12) % 4096;

	while (crash_seen[i].at && crash_seen[i].at != at)
		i = (i + 1) % 4096;
	crash_seen[i].at = at;
	return crash_seen[i].nr++ < crash_repeats;
}

NOT_COUNTED void __sanitizer_cov_trace_pc(void)
{
	void (*call)(void *arg) = crash_point;

	if (!call)
		return;
	crash_point = 0;
	if (crash_point_is_new((uintptr_t)__builtin_return_address(0))) {
		nr_crash_points++;
		call(crash_arg);
	}
	crash_point = call;
}

/* From here on: @call at each step of this thread; NULL ends it. */
NOT_COUNTED static inline void watch_crash_points(void (*call)(void *arg), void *arg,
						  uint32_t repeats)
{
	memset(crash_seen, 0, sizeof(crash_seen));
	crash_repeats = repeats;
	crash_arg = arg;
	nr_crash_points = 0;
	crash_point = call;
}

#endif
