"""What the daemon does when there is nothing to do: nothing."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TIMEOUT, Mounted, Swapped

LOAD = Path(__file__).with_name("load.py")
SLEEPER = """
import mmap, time
memory = mmap.mmap(-1, 120 << 20)
for at in range(0, len(memory), 4096):
    memory[at : at + 8] = at.to_bytes(8)
time.sleep(120)
"""


def _switches(mounted: Mounted) -> int:
    """Return the context switches of all threads of both processes."""
    total = 0
    for process in mounted.daemon():
        for status in Path(f"/proc/{process}/task").glob("*/status"):
            found = re.findall(r"ctxt_switches:\s+(\d+)", status.read_text())
            total += sum(map(int, found))
    return total


@pytest.mark.swapped
def test_an_idle_daemon_sleeps(swapped_on: Callable[..., Swapped], corpus_file: Path) -> None:
    """At most 2 context switches a second with swap on, after use, pages still in it."""
    swap = swapped_on("--size", "512M")
    stays = swap.load(64, sys.executable, "-c", SLEEPER)
    load = swap.load(64, sys.executable, LOAD, corpus_file, 120, 2, 1)
    assert load.wait(TIMEOUT) == 0
    time.sleep(5)
    assert swap.stats()["PagesStored"] + swap.stats()["ZeroPages"] > 10_000
    before = _switches(swap)
    time.sleep(10)
    assert _switches(swap) - before <= 20
    assert stays.poll() is None
    stays.kill()
    stays.communicate()
    load.communicate()
