/* SPDX-License-Identifier: MIT
 *
 * Tests of the switch: what goes to pyfuse3 and what comes back from it.
 */
#include "fake_kernel.h"

static void test_other_requests_reach_pyfuse3_as_they_are(void **state)
{
	static const uint32_t opcodes[] = {FUSE_LOOKUP,	 FUSE_FORGET,
					   FUSE_GETATTR, FUSE_SETATTR,
					   FUSE_OPEN,	 FUSE_READ,
					   FUSE_WRITE,	 FUSE_STATFS,
					   FUSE_RELEASE, FUSE_FLUSH,
					   FUSE_FSYNC,	 FUSE_OPENDIR,
					   FUSE_READDIR, FUSE_BATCH_FORGET,
					   FUSE_DESTROY, FUSE_IOCTL,
					   FUSE_LSEEK,	 FUSE_COPY_FILE_RANGE,
					   52,		 4096,
					   UINT32_MAX};
	struct world w;

	(void)state;
	start(&w);
	for (uint32_t i = 0; i < ARRAY_SIZE(opcodes); i++) {
		fill(pattern, i, 1000 + i, i);
		make(&w, opcodes[i], OTHER, pattern, 1000 + i);
		post(&w);
		receive(w.python);
		assert_int_equal(got.bytes, sent.bytes);
		assert_memory_equal(got.raw, sent.raw, sent.bytes);
	}
	/* Of the swap file, all but page I/O. */
	make(&w, FUSE_GETATTR, SWAP, pattern, 16);
	post(&w);
	receive(w.python);
	assert_memory_equal(got.raw, sent.raw, sent.bytes);
	assert_int_equal(invalid_io(&w), 0);
	stop(&w);
}

static void test_replies_of_pyfuse3_reach_the_kernel_as_they_are(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	for (uint32_t i = 0; i < 20; i++) {
		uint32_t nr = i == 19 ? REQUEST_BYTES : i * 500;

		fill(pattern, i, nr, i);
		reply_of(1000 + i, i % 3 ? 0 : -ENOENT, pattern, nr);
		if (i == 7)
			reply_of(0, 2 /* a notification */, pattern, nr);
		assert_int_equal(send(w.python, sent.raw, sent.bytes, 0), sent.bytes);
		receive(w.kernel);
		assert_int_equal(got.bytes, sent.bytes);
		assert_memory_equal(got.raw, sent.raw, sent.bytes);
	}
	stop(&w);
}

static void test_broken_replies_of_pyfuse3_become_eio(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	reply_of(1001, 0, pattern, 100);
	sent.out.len++;
	send(w.python, sent.raw, sent.bytes, 0);
	sent.in.unique = 1001;
	assert_int_equal(answer(&w), -EIO);
	reply_of(1002, 0, pattern, REQUEST_BYTES); /* longer than any buffer here */
	sent.bytes = sent.out.len = MESSAGE_BYTES;
	send(w.python, sent.raw, sent.bytes, 0);
	sent.in.unique = 1002;
	assert_int_equal(answer(&w), -EIO);
	send(w.python, "short", 5, 0);
	assert_int_equal(read_at(&w, 0, 4096), 4096);
	assert_false(readable(w.kernel, 20));
	stop(&w);
}

#define OFFERED                                                                                    \
	(FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_ASYNC_DIO |                \
	 FUSE_WRITEBACK_CACHE | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_INIT_EXT)

static struct fuse_init_out *init_of(uint8_t *reply)
{
	return (struct fuse_init_out *)(reply + sizeof(struct fuse_out_header));
}

static size_t make_init_reply(uint8_t *reply, uint32_t flags, size_t bytes)
{
	struct fuse_out_header *out = (struct fuse_out_header *)reply;

	memset(reply, 0xa5, INIT_REPLY_BYTES);
	*out = (struct fuse_out_header){.len = (uint32_t)(sizeof(*out) + bytes), .unique = 5};
	*init_of(reply) = (struct fuse_init_out){.major = 7,
						 .minor = 31,
						 .max_readahead = 131072,
						 .flags = flags,
						 .max_write = 1 << 20,
						 .time_gran = 1,
						 .flags2 = 0xffff};
	return out->len;
}

static void test_init_reply_gets_our_limits(void **state)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));
	struct fuse_init_out *init = init_of(reply);
	size_t bytes = make_init_reply(reply, OFFERED, sizeof(*init));

	(void)state;
	assert_int_equal(init_rewrite(reply, bytes, OFFERED, REQUEST_BYTES), INIT_REPLY_BYTES);
	assert_int_equal(init->major, 7);
	assert_int_equal(init->minor, 31);
	assert_int_equal(init->max_readahead, 131072);
	assert_int_equal(init->time_gran, 1);
	assert_int_equal(init->max_write, REQUEST_BYTES);
	assert_int_equal(init->max_pages, REQUEST_BYTES / 4096);
	assert_int_equal(init->max_background, 128);
	assert_int_equal(init->congestion_threshold, 96);
	assert_int_equal(init->flags, FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO |
					      FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES);
	assert_int_equal(init->flags2, 0);
}

static void test_init_reply_asks_only_for_what_is_offered(void **state)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));
	size_t bytes = make_init_reply(reply, UINT32_MAX, sizeof(struct fuse_init_out));

	(void)state;
	init_rewrite(reply, bytes, FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC, REQUEST_BYTES);
	assert_int_equal(init_of(reply)->flags, FUSE_ASYNC_READ);
}

/* Older libraries send 24 bytes; what they leave out is zero, not what was in the buffer. */
static void test_short_init_reply_is_made_whole(void **state)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));
	struct fuse_out_header *out = (struct fuse_out_header *)reply;

	(void)state;
	for (size_t bytes = 8; bytes < sizeof(struct fuse_init_out); bytes += 4) {
		make_init_reply(reply, 0, bytes);
		memset(reply + sizeof(*out) + bytes, 0x77, INIT_REPLY_BYTES - sizeof(*out) - bytes);
		assert_int_equal(init_rewrite(reply, out->len, OFFERED, REQUEST_BYTES),
				 INIT_REPLY_BYTES);
		assert_int_equal(out->len, INIT_REPLY_BYTES);
		assert_int_equal(init_of(reply)->max_write, REQUEST_BYTES);
		assert_int_equal(init_of(reply)->unused[6], 0);
		assert_int_equal(init_of(reply)->time_gran, bytes >= 28);
	}
}

static void test_strange_init_replies_are_left_alone(void **state)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));
	uint8_t before[INIT_REPLY_BYTES];
	struct fuse_out_header *out = (struct fuse_out_header *)reply;

	(void)state;
	for (int i = 0; i < 3; i++) {
		size_t bytes = make_init_reply(reply, OFFERED, sizeof(struct fuse_init_out));

		if (i == 0)
			out->error = -EPROTO;
		else if (i == 1)
			init_of(reply)->major = 8;
		else
			bytes = sizeof(*out) + 4;
		memcpy(before, reply, sizeof(before));
		assert_int_equal(init_rewrite(reply, bytes, OFFERED, REQUEST_BYTES), bytes);
		assert_memory_equal(before, reply, sizeof(before));
	}
}

static void make_init(struct world *w)
{
	struct fuse_init_in in = {.major = 7, .minor = 45, .flags = OFFERED, .flags2 = 0xfff};

	make(w, FUSE_INIT, 0, &in, sizeof(in));
}

/* pyfuse3 answers what it has just received. */
static void answer_init(struct world *w, int error)
{
	uint8_t reply[INIT_REPLY_BYTES] __attribute__((aligned(8)));

	receive(w->python);
	assert_memory_equal(got.raw, sent.raw, sent.bytes);
	make_init_reply(reply, OFFERED, sizeof(struct fuse_init_out));
	if (error)
		reply_of(got.in.unique, error, NULL, 0);
	else
		reply_of(got.in.unique, 0, init_of(reply), sizeof(struct fuse_init_out));
	send(w->python, sent.raw, sent.bytes, 0);
}

static void test_init_makes_the_switch_ready(void **state)
{
	struct world w;
	uint64_t unique;

	(void)state;
	start(&w);
	make_init(&w);
	unique = sent.in.unique;
	post(&w);
	assert_false(switch_ready(w.sw));
	answer_init(&w, 0);
	receive(w.kernel);
	assert_int_equal(got.out.unique, unique);
	assert_int_equal(init_of(got.raw)->max_background, 128);
	for (int i = 0; !switch_ready(w.sw) && i < 1000; i++)
		usleep(1000);
	assert_true(switch_ready(w.sw));
	/* What a later worker will need. */
	assert_int_equal(w.sw->journal->init_bytes, sizeof(struct fuse_in_header) + 64);
	/* A second one is not this kernel's; a reply with its unique is no INIT's any more. */
	make_init(&w);
	assert_int_equal(ask(&w), -EINVAL);
	reply_of(unique, 0, pattern, 64);
	send(w.python, sent.raw, sent.bytes, 0);
	receive(w.kernel);
	assert_memory_equal(got.raw, sent.raw, sent.bytes);
	stop(&w);
}

static void test_refused_init_does_not_make_it_ready(void **state)
{
	struct world w;

	(void)state;
	start(&w);
	make_init(&w);
	post(&w);
	answer_init(&w, -EPROTO);
	receive(w.kernel);
	assert_int_equal(got.out.error, -EPROTO);
	usleep(10000);
	assert_false(switch_ready(w.sw));
	stop(&w);
}

/* Requests for pyfuse3 until one is refused. Return: how many were taken. */
static uint32_t fill_up(struct world *w, uint64_t *first)
{
	uint32_t nr = 0;

	*first = w->unique;
	for (;;) {
		make(w, FUSE_GETATTR, OTHER, pattern, 997);
		post(w);
		/* A page request behind it: when that is answered, this one was decided. */
		make_read(w, 0, 4096);
		post(w);
		receive(w->kernel);
		if (got.out.error == -EAGAIN) {
			assert_int_equal(got.out.unique, sent.in.unique - 1);
			assert_int_equal(answer(w), 0);
			return nr;
		}
		assert_int_equal(got.out.unique, sent.in.unique);
		assert_int_equal(got.out.error, 0);
		nr++;
		assert_true(nr < 100000);
	}
}

static void test_pages_go_on_while_pyfuse3_does_not_read(void **state)
{
	struct world w;
	uint64_t first;
	uint32_t nr;

	(void)state;
	start(&w);
	nr = fill_up(&w, &first);
	assert_true(nr > (1 << 20) / 1100);
	/* FORGET wants no answer and gets none; page I/O is as ever. */
	make(&w, FUSE_FORGET, OTHER, pattern, 997);
	post(&w);
	fill(pattern, 0, REQUEST_BYTES, 9);
	assert_int_equal(write_at(&w, 0, REQUEST_BYTES, pattern), REQUEST_BYTES);
	assert_int_equal(read_at(&w, 0, REQUEST_BYTES), REQUEST_BYTES);
	assert_memory_equal(content(), pattern, REQUEST_BYTES);
	make(&w, FUSE_GETATTR, OTHER, NULL, 0);
	make_fallocate(&w, SWAP, 0, 4096, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
	assert_int_equal(ask(&w), 0);
	/* It reads again: all that was taken comes, whole and in order. */
	for (uint32_t i = 0; i < nr; i++) {
		receive(w.python);
		assert_int_equal(got.bytes, sizeof(got.in) + 997);
		assert_int_equal(got.in.unique, first + 2 * i);
	}
	make(&w, FUSE_STATFS, OTHER, NULL, 0);
	post(&w);
	receive(w.python);
	assert_int_equal(got.in.opcode, FUSE_STATFS);
	assert_false(readable(w.python, 20));
	stop(&w);
}

static void test_pages_go_on_when_pyfuse3_is_gone(void **state)
{
	struct world w;
	uint64_t first;
	uint32_t nr;

	(void)state;
	start(&w);
	nr = fill_up(&w, &first);
	shutdown(w.python, SHUT_RDWR);
	/* Those that it had not received are answered; those in its socket are lost with it. */
	for (uint32_t i = 0; i < (1 << 20) / 1100; i++) {
		receive(w.kernel);
		assert_int_equal(got.out.error, -EIO);
		assert_in_range(got.out.unique, first, first + 2 * nr);
	}
	while (readable(w.kernel, 50))
		receive(w.kernel);
	make(&w, FUSE_GETATTR, OTHER, NULL, 0);
	assert_int_equal(ask(&w), -EIO);
	make(&w, FUSE_FORGET, OTHER, pattern, 8);
	post(&w);
	fill(pattern, 0, 8192, 9);
	assert_int_equal(write_at(&w, 0, 8192, pattern), 8192);
	assert_int_equal(read_at(&w, 0, 8192), 8192);
	assert_memory_equal(content(), pattern, 8192);
	assert_int_equal(invalid_io(&w), 0);
	stop(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_other_requests_reach_pyfuse3_as_they_are),
		cmocka_unit_test(test_replies_of_pyfuse3_reach_the_kernel_as_they_are),
		cmocka_unit_test(test_broken_replies_of_pyfuse3_become_eio),
		cmocka_unit_test(test_init_reply_gets_our_limits),
		cmocka_unit_test(test_init_reply_asks_only_for_what_is_offered),
		cmocka_unit_test(test_short_init_reply_is_made_whole),
		cmocka_unit_test(test_strange_init_replies_are_left_alone),
		cmocka_unit_test(test_init_makes_the_switch_ready),
		cmocka_unit_test(test_refused_init_does_not_make_it_ready),
		cmocka_unit_test(test_pages_go_on_while_pyfuse3_does_not_read),
		cmocka_unit_test(test_pages_go_on_when_pyfuse3_is_gone),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
