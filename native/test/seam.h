/* SPDX-License-Identifier: MIT
 *
 * seam - the kernel calls that give memory and take it back, in place of libc's, so that a test
 * can have the Nth one fail. Included by one file of a test program.
 */
#ifndef SEAM_H
#define SEAM_H

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What calls do: the first @pass go to the kernel, the next @fail end with @error. */
struct seam {
	_Atomic int pass, fail, error;
	_Atomic int calls;
};

static struct seam populate_seam, punch_seam, advise_seam;

static inline void seam_set(struct seam *seam, int pass, int fail, int error)
{
	seam->error = error;
	seam->pass = pass;
	seam->calls = 0;
	seam->fail = fail;
}

static inline void seam_reset(void)
{
	seam_set(&populate_seam, 0, 0, 0);
	seam_set(&punch_seam, 0, 0, 0);
	seam_set(&advise_seam, 0, 0, 0);
}

static inline bool seam_fails(struct seam *seam)
{
	atomic_fetch_add(&seam->calls, 1);
	if (seam->fail <= 0)
		return false;
	if (atomic_fetch_sub(&seam->pass, 1) > 0)
		return false;
	if (atomic_fetch_sub(&seam->fail, 1) <= 0)
		return false;
	errno = seam->error;
	return true;
}

int fallocate(int fd, int mode, off_t offset, off_t bytes)
{
	if (seam_fails(mode & FALLOC_FL_PUNCH_HOLE ? &punch_seam : &populate_seam))
		return -1;
	return (int)syscall(SYS_fallocate, fd, mode, offset, bytes);
}

int madvise(void *at, size_t bytes, int advice)
{
	if (advice == 23 /* MADV_POPULATE_WRITE */ && seam_fails(&advise_seam))
		return -1;
	return (int)syscall(SYS_madvise, at, bytes, advice);
}

#endif
