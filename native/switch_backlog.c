/* SPDX-License-Identifier: MIT
 *
 * switch_backlog - buffers, and the long writes that wait in them; see switch.h
 *
 * There are as many buffers as lanes, and BACKLOG_LENGTH more. A lane holds one at the most, the
 * backlog that many, so that a lane without one always finds one.
 */
#include "switch.h"

#include <string.h>

struct buffer *buffer_take(struct fuse_switch *sw)
{
	struct backlog *b = &sw->backlog;
	struct buffer *buffer;

	pthread_mutex_lock(&b->lock);
	buffer = b->free;
	b->free = buffer->next;
	b->nr_free--;
	pthread_mutex_unlock(&b->lock);
	return buffer;
}

/* Context: the backlog's lock. */
static void push_free(struct backlog *b, struct buffer *buffer)
{
	buffer->next = b->free;
	b->free = buffer;
	b->nr_free++;
}

void buffer_give(struct fuse_switch *sw, struct buffer *buffer)
{
	pthread_mutex_lock(&sw->backlog.lock);
	push_free(&sw->backlog, buffer);
	pthread_mutex_unlock(&sw->backlog.lock);
}

static void wipe(struct buffer *buffer)
{
	memset(buffer->message, 0, buffer->used);
	buffer->used = 0;
}

bool buffers_wipe(struct fuse_switch *sw, struct buffer *own)
{
	struct backlog *b = &sw->backlog;
	bool all;

	pthread_mutex_lock(&b->lock);
	for (struct buffer *buffer = b->free; buffer; buffer = buffer->next)
		wipe(buffer);
	all = b->nr_free + 1 == sw->options.nr_lanes + BACKLOG_LENGTH;
	pthread_mutex_unlock(&b->lock);
	wipe(own);
	return all;
}

/* Context: the backlog's lock. */
static void append(struct backlog *b, struct buffer *buffer)
{
	buffer->next = NULL;
	if (b->first)
		b->last->next = buffer;
	else
		b->first = buffer;
	b->last = buffer;
	b->length++;
}

/* Context: the backlog's lock. Return: the oldest, or NULL. */
static struct buffer *pop(struct backlog *b)
{
	struct buffer *buffer = b->first;

	if (buffer) {
		b->first = buffer->next;
		b->length--;
	}
	return buffer;
}

bool backlog_put(struct fuse_switch *sw, struct buffer *buffer)
{
	struct backlog *b = &sw->backlog;
	bool waits;

	pthread_mutex_lock(&b->lock);
	waits = b->nr_writing >= b->max_writing && b->length < BACKLOG_LENGTH;
	if (waits)
		append(b, buffer);
	else
		b->nr_writing++;
	pthread_mutex_unlock(&b->lock);
	return waits;
}

/* The next write for the lane that has served @done, or NULL: it shall read again. */
static struct buffer *next_write(struct backlog *b, struct buffer *done)
{
	struct buffer *buffer = NULL;

	pthread_mutex_lock(&b->lock);
	push_free(b, done);
	if (b->nr_writing <= b->max_writing)
		buffer = pop(b);
	if (!buffer)
		b->nr_writing--;
	pthread_mutex_unlock(&b->lock);
	return buffer;
}

void backlog_serve(struct lane *lane, struct buffer *buffer)
{
	while (buffer) {
		request_serve(lane, buffer);
		journal_begin(lane->journal);
		buffer = next_write(&lane->sw->backlog, buffer);
	}
}
