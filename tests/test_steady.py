"""In steady state, under load, nothing on the way of a page asks the OS for memory.

STEADY_SECONDS=60 looks for a minute.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TIMEOUT, Swapped

from zswapfs import _native

LOAD = Path(__file__).with_name("load.py")
MEMORY_CALLS = "mmap,munmap,brk,madvise,mremap,mprotect,clone,clone3,fork,vfork,execve"
SECONDS = int(os.environ.get("STEADY_SECONDS", "15"))
MAX_LANE_FAULTS = 100  # in the first swap-out; measured 3, and 600 with buffers on fault


def _threads(process: int) -> dict[str, str]:
    """Return the names of a process's threads, by id."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return {task.name: (task / "comm").read_text().strip() for task in tasks}


def _major_faults(processes: list[int]) -> int:
    total = 0
    for process in processes:
        for task in Path(f"/proc/{process}/task").iterdir():
            total += int((task / "stat").read_text().rpartition(")")[2].split()[9])
    return total


def _lane_faults(worker: int) -> int:
    """Return the minor faults of a worker's lanes."""
    total = 0
    for tid, name in _threads(worker).items():
        if name.startswith("zs-lane"):
            stat = Path(f"/proc/{worker}/task/{tid}/stat").read_text()
            total += int(stat.rpartition(")")[2].split()[7])
    return total


def test_no_thread_local_memory_comes_late() -> None:
    """No thread's first use of a thread-local variable makes the C library ask for memory."""
    module = Path(_native.__file__).read_bytes()
    assert b"store_write" in module
    assert b"__tls_get_addr" not in module


@pytest.mark.swapped
def test_lanes_ask_for_no_memory(swapped_on: Callable[..., Swapped], corpus_file: Path) -> None:
    """No call of lanes and relay that could, and no major fault in any thread."""
    strace = shutil.which("strace")
    assert strace, "strace is not installed"
    swap = swapped_on("--size", "512M")
    load = swap.load(64, sys.executable, LOAD, corpus_file, 160, 1, 100)
    time.sleep(5)
    (worker,) = (process for process in swap.daemon() if len(_threads(process)) > 1)
    threads = [tid for tid, name in _threads(worker).items() if name.startswith("zs-")]
    assert len(threads) >= 4  # two lanes, relay, keeper
    lanes = [tid for tid, name in _threads(worker).items() if re.match(r"zs-(lane|relay)", name)]
    faults = _major_faults(swap.daemon())
    words = [strace, "-c", "-e", f"trace=read,write,{MEMORY_CALLS}"]
    for tid in lanes:
        words += ["-p", tid]
    trace = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    time.sleep(SECONDS)
    trace.send_signal(signal.SIGINT)
    _, counted = trace.communicate(timeout=TIMEOUT)
    calls = {line.split()[-1]: int(line.split()[3]) for line in counted.splitlines()
             if re.match(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+\d+", line)}  # fmt: skip
    assert calls.pop("read") > 1000
    assert calls.pop("write") > 1000
    calls.pop("total")
    assert calls == {}
    assert _major_faults(swap.daemon()) == faults
    assert load.poll() is None
    load.kill()
    load.communicate()


@pytest.mark.swapped
def test_first_swap_out_finds_its_memory(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """Buffers and desks were populated before; what is left are table pages nobody foresaw."""
    swap = swapped_on("--size", "512M")
    (worker,) = (process for process in swap.daemon() if len(_threads(process)) > 1)
    before = _lane_faults(worker)
    load = swap.load(64, sys.executable, LOAD, corpus_file, 160, 1, 100)
    time.sleep(5)
    assert load.poll() is None
    load.kill()
    load.communicate()
    assert _lane_faults(worker) - before < MAX_LANE_FAULTS
