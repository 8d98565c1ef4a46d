"""Faults for the daemon: it calls one of these before anything else (conftest.mount_strange)."""

import itertools
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import pyfuse3
import trio

from zswapfs import compaction, filesystem, heartbeat, store, worker

_run = worker.run
_statfs = filesystem.Filesystem.statfs


def pyfuse3_does_not_start() -> None:
    """Refuse to initialise."""

    def init(*_args: object) -> NoReturn:
        raise RuntimeError("refused")

    pyfuse3.init = init


def the_policy_fails() -> None:
    """End the compaction task soon."""

    async def task(*_args: object) -> NoReturn:
        await trio.sleep(0.2)
        raise RuntimeError("policy")

    compaction.compaction_task = task


def statistics_fail() -> None:
    """Raise what the file ``now`` says: an errno, or anything else."""

    def total(_self: object) -> NoReturn:
        error = Path(os.environ["STRANGE"], "now").read_text()
        raise OSError(int(error), "no") if error else RuntimeError("no")

    worker.OwnMemory.total = total  # type: ignore[method-assign]


def no_resend() -> None:
    """Behave as before Linux 6.9."""
    worker.has_resend = lambda: False


def no_resend_and_hanging_statfs() -> None:
    """Behave as before Linux 6.9, and hang in the first worker's statfs."""
    no_resend()
    hanging_statfs()


def hanging_statfs() -> None:
    """Hang in the first worker's statfs; a later one answers."""

    async def statfs(self: Any, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        if self._serial >> 32 == 0:
            await trio.sleep_forever()
        return await _statfs(self, ctx)

    filesystem.Filesystem.statfs = statfs  # type: ignore[method-assign]


def failing_statfs() -> None:
    """End the control plane by each statfs."""

    async def statfs(_self: Any, _ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        raise RuntimeError("statfs is strange")

    filesystem.Filesystem.statfs = statfs  # type: ignore[method-assign]


def dying_workers() -> None:
    """Have the second to the fifth worker die at once."""

    def run(job: worker.Job) -> int:
        if 0 < job.restarts < 5:
            os.abort()
        return _run(job)

    worker.run = run


def slow_start() -> None:
    """Have the second worker hang before it serves."""
    heartbeat.START_SECONDS = 6.0

    def run(job: worker.Job) -> int:
        if job.restarts == 1:
            time.sleep(1000)
        return _run(job)

    worker.run = run


def late_second_worker() -> None:
    """Have the second worker serve after two seconds."""

    def run(job: worker.Job) -> int:
        if job.restarts == 1:
            time.sleep(2)
        return _run(job)

    worker.run = run


def confused_supervisor() -> None:
    """Fail each second time that a supervisor looks after its worker."""
    steps = store.lane_steps
    looks = itertools.count()

    def lane_steps(region_fd: int) -> tuple[int, ...]:
        if next(looks) % 2 == 0:
            raise MemoryError
        return steps(region_fd)

    store.lane_steps = lane_steps


def failing_start() -> None:
    """Have no worker start."""

    def run(job: worker.Job) -> int:
        raise OSError(12, f"nothing for {job.restarts}")

    worker.run = run
