"""Other programs in the place of a supervisor's, under load that is verified."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TIMEOUT, Mounted, Swapped, zswapfs
from processes import pattern, processes, read, region, wait_for, worker_of, write

from zswapfs.mount import restart_python

LOAD = Path(__file__).with_name("load.py")


@pytest.mark.mounted
def test_without_resend_a_restart_is_refused(strange: Callable[[str], Mounted]) -> None:
    """It would fail what is under way, which may be somebody's page."""
    mounted = strange("no_resend")
    before = processes(mounted)
    done = zswapfs("restart", mounted.path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "before Linux 6.9" in done.stderr
    assert processes(mounted) == before


def _has_no_names(mounted: Mounted) -> bool:
    try:
        mounted.stats()
    except OSError:
        return True
    return False


@pytest.mark.mounted
def test_a_restart_brings_names_back(strange: Callable[[str], Mounted]) -> None:
    """After two control planes have failed there is none until then."""
    mounted = strange("failing_statfs")
    with pytest.raises(OSError, match="Input/output error"):
        os.statvfs(mounted.path)
    wait_for(lambda: _has_no_names(mounted))
    done = zswapfs("restart", mounted.path)
    assert done.returncode == 0, done.stderr
    assert mounted.stats()["Restarts"] == 3


def _python_that(place: Path, does: str) -> Path:
    """Return an interpreter for a restart."""
    script = place.with_name("python")
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return script


@pytest.mark.mounted
def test_workers_are_replaced_while_a_restart_is_tried(mounted: Mounted) -> None:
    """The installed program may take its time."""
    write(mounted, pattern(14))
    first, worker = processes(mounted)
    started = mounted.path.with_name("started")
    python = _python_that(mounted.path, f"touch {started}; sleep 3; echo no >&2; exit 1")
    restart_python(mounted.path).write_text(str(python))
    try:
        os.kill(first, signal.SIGHUP)
        wait_for(started.exists)
        began = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        assert read(mounted) == pattern(14)
        assert time.monotonic() - began < 2
    finally:
        restart_python(mounted.path).unlink()
    assert processes(mounted)[0] == first


@pytest.mark.mounted
def test_a_restart_right_after_a_death_is_answered(mounted: Mounted) -> None:
    """By the new program, not by the worker that becomes ready meanwhile."""
    os.kill(worker_of(mounted), signal.SIGKILL)
    done = zswapfs("restart", mounted.path)
    assert done.returncode == 0, done.stderr
    assert "goes on with version" in done.stdout
    assert mounted.stats()["Restarts"] == 2


@pytest.mark.mounted
def test_programs_have_no_protection_of_the_daemons(mounted: Mounted) -> None:
    """What only the daemon may have is inherited, unless it is dropped."""
    first, _ = processes(mounted)
    Path(f"/proc/{first}/oom_score_adj").write_text("500")
    found = mounted.path.with_name("found")
    python = _python_that(
        mounted.path, f"cat /proc/self/oom_score_adj >{found}.new; mv {found}.new {found}"
    )
    restart_python(mounted.path).write_text(str(python))
    try:
        os.kill(first, signal.SIGHUP)
        wait_for(found.exists)
    finally:
        restart_python(mounted.path).unlink()
    assert found.read_text() == "0\n"


@pytest.mark.mounted
def test_a_program_that_cannot_be_run_changes_nothing(mounted: Mounted) -> None:
    """Neither one that is gone, nor one that says nothing of its version."""
    first, worker = processes(mounted)
    for python in (Path("/nowhere/python"), _python_that(mounted.path, "exit 0")):
        restart_python(mounted.path).write_text(str(python))
        os.kill(first, signal.SIGHUP)
        time.sleep(0.5)
    restart_python(mounted.path).unlink()
    assert processes(mounted) == (first, worker)
    assert zswapfs("restart", mounted.path).returncode == 0


BRING_IN = """
import mmap, sys
from pathlib import Path
from zswapfs import worker

def swapped():
    return int(Path("/proc/self/status").read_text().partition("VmSwap:")[2].split()[0])

mine = [bytes([i & 255]) * 5000 for i in range(4000)]
hog = mmap.mmap(-1, 96 << 20)
for at in range(0, len(hog), 4096):
    hog[at] = 1
before = swapped()
hog.close()
worker.protect_memory(bring_in=True)
print(before, swapped())
sys.stdout.flush()
"""


@pytest.mark.swapped
def test_what_is_in_swap_comes_back_when_it_is_locked(swapped_on: Callable[..., Swapped]) -> None:
    """Or a supervisor that takes over would wait for what only the dead worker could bring."""
    swap = swapped_on("--size", "256M")
    program = swap.load(64, sys.executable, "-P", "-c", BRING_IN)
    out, _ = program.communicate(timeout=TIMEOUT)
    before, after = map(int, out.split())
    assert before > 1000
    assert after == 0


@pytest.mark.swapped
def test_restart_under_live_swap(swapped_on: Callable[..., Swapped], corpus_file: Path) -> None:
    """The same supervisor process, another program in it, another worker; nothing is lost."""
    swap = swapped_on("--size", "256M")
    load = swap.load(48, sys.executable, LOAD, corpus_file, 120, 3, 4)
    for count in range(1, 4):
        time.sleep(0.5)
        first, worker = processes(swap)
        done = zswapfs("restart", swap.path)
        assert done.returncode == 0, done.stderr
        assert "goes on with version" in done.stdout
        assert processes(swap)[0] == first
        assert processes(swap)[1] != worker
        assert swap.stats()["Restarts"] == count
    os.kill(processes(swap)[1], signal.SIGKILL)
    out, _ = load.communicate(timeout=2 * TIMEOUT)
    assert load.returncode == 0, out
    assert swap.stats()["Restarts"] == 4
    assert swap.stats()["FailedReads"] == 0
    assert zswapfs("down", swap.path).returncode == 0


@pytest.mark.mounted
def test_a_version_that_cannot_read_the_region_refuses(mounted: Mounted) -> None:
    """Before anything is touched: the same worker serves on."""
    write(mounted, pattern(7))
    before = processes(mounted)
    with region(mounted) as fd:
        geometry = os.pread(fd, 4096, 0)
        places = [found.start() + 8 for found in re.finditer(b"zswapfs\0", geometry)]
        assert len(places) == 2
        for at in places:
            os.pwrite(fd, bytes([geometry[at] + 1]), at)
        done = zswapfs("restart", mounted.path)
        for at in places:
            os.pwrite(fd, geometry[at : at + 1], at)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot go on from here" in done.stderr
    assert processes(mounted) == before
    assert read(mounted) == pattern(7)
    assert mounted.stats()["Restarts"] == 0


def test_restart_of_what_is_not_mounted(tmp_path: Path) -> None:
    """One line, exit code 1."""
    done = zswapfs("restart", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
