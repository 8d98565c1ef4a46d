"""A mount's processes and pages, for the tests that end and exchange them."""

import contextlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import Mounted


def processes(mounted: Mounted) -> tuple[int, int]:
    """Return supervisor and worker."""
    names = {(Path("/proc") / str(pid) / "comm").read_text(): pid for pid in mounted.daemon()}
    return names["zswapfs\n"], names["zswapfs-worker\n"]


def wait_for(what: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def new_worker(mounted: Mounted, old: int) -> int:
    """Wait for the next worker and return it."""
    found = [old]

    def is_there() -> bool:
        with contextlib.suppress(KeyError, OSError):
            found[0] = processes(mounted)[1]
        return found[0] != old

    wait_for(is_there)
    return found[0]


@contextlib.contextmanager
def region(mounted: Mounted) -> Iterator[int]:
    """Open the daemon's region, which outlives it then."""
    for entry in Path(f"/proc/{processes(mounted)[0]}/fd").iterdir():
        if re.search(r"/#\d+ \(deleted\)|memfd:zswapfs", str(entry.readlink())):
            fd = os.open(entry, os.O_RDWR)
            break
    else:
        raise AssertionError("no region")
    try:
        yield fd
    finally:
        os.close(fd)


def pattern(number: int) -> bytes:
    """Return a page that goes by this number."""
    return random.Random(number).randbytes(2048) * 2


def write(mounted: Mounted, page: bytes) -> None:
    """Write the first page."""
    with mounted.file.open("r+b") as file:
        file.write(page)


def read(mounted: Mounted) -> bytes:
    """Read the first page."""
    with mounted.file.open("rb") as file:
        return file.read(4096)


def worker_of(mounted: Mounted) -> int:
    """Return the worker."""
    return processes(mounted)[1]
