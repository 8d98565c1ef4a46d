"""When to compact, and how much. How, is native/compact.c's.

The store tells, through an eventfd, when blocks have been freed; without frees nothing runs and
nothing wakes. Then one of two gears:

- gently: one round (4 MiB moved at the most, a few milliseconds), then a pause of ten times as
  long, so that compaction takes a tenth of a CPU at the most;
- fast: no pauses, when much can be won (``compact_fast`` percent of the memory lies free inside
  chunks) or the memory limit is near.

A round that wins nothing ends it, until blocks worth half of ``compact_at`` percent of the
memory have been freed anew.
"""

import os
import time

import trio

from .config import Options
from .stats import Stats
from .store import Store, watched

LEAST_BYTES = 256 << 10
"""Freed blocks below this are no reason to look."""
STEP_BYTES = 1
"""Asks for one round: it ends after the round that won this."""
PAUSE_FACTOR = 10
LEAST_PAUSE = 0.02
"""Seconds; frees come in bursts, and a burst is better seen as a whole."""
NEAR_LIMIT = 0.9


def free_percent(stats: Stats) -> float:
    """Return the share of the arena's memory that is free inside chunks."""
    used = stats.mem_used_bytes
    return 100 * stats.free_bytes / used if used else 0.0


def is_urgent(stats: Stats, options: Options) -> bool:
    """Say whether to go without pauses."""
    near = stats.mem_limit and stats.mem_used_bytes > NEAR_LIMIT * stats.mem_limit
    return bool(near) or free_percent(stats) >= options.compact_fast


async def _compact_now(store: Store, options: Options) -> None:
    """Go on until what is free is below the threshold, or a round wins nothing."""
    while True:
        stats = await trio.to_thread.run_sync(store.stats)
        if free_percent(stats) < options.compact_at or stats.free_bytes < LEAST_BYTES:
            return
        before = time.monotonic()
        won = await trio.to_thread.run_sync(store.compact, STEP_BYTES)
        if not won:
            return
        if not is_urgent(stats, options):
            spent = time.monotonic() - before
            await trio.sleep(max(LEAST_PAUSE, PAUSE_FACTOR * spent))


async def compaction_task(store: Store, options: Options) -> None:
    """Compact whenever it pays, until cancelled."""
    event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    with watched(store, event_fd):
        while True:
            stats = await trio.to_thread.run_sync(store.stats)
            share = options.compact_at / 100 / 2
            store.watch(event_fd, max(LEAST_BYTES, int(share * stats.mem_used_bytes)))
            await trio.lowlevel.wait_readable(event_fd)
            os.eventfd_read(event_fd)
            await trio.sleep(LEAST_PAUSE)
            await _compact_now(store, options)
