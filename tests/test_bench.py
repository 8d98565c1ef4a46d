"""The benchmarks run, and report what they promise: tiny here, not to be read for speed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TOP

sys.path.insert(0, str(TOP / "contrib/bench"))
import daemons


def _bench(name: str, prefix: Path, *words: object, timeout: float = 150) -> tuple[str, Any]:
    """Run a benchmark; return what it printed, and its JSON."""
    script = TOP / "contrib" / "bench" / name
    done = subprocess.run(
        [sys.executable, script, "--output", prefix, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(prefix.with_suffix(".json").read_text())


def test_store(tmp_path: Path) -> None:
    """Speeds by threads and by size; tables only of the pages touched in 64 GiB."""
    out, result = _bench(
        "store", tmp_path / "s", "--rounds", 1, "--pages", 6144, "--few", 1000, "--many", 4000
    )
    assert "store/LZ4" in out
    assert all(result["speed"][0]["write"][who] > 0 for who in ("codec_1", "codec_2", "store_2"))
    assert result["scale"][0]["read"]["many_ns"] > 0
    assert result["sparse"]["table_bytes"] < 48 << 20


@pytest.mark.swapped
def test_device(tmp_path: Path) -> None:
    """Every job, on the loop device and on the file."""
    words = ("--rounds", 1, "--seconds", 0.1, "--mib", 16, "--only", "zswapfs,tmpfs")
    _, result = _bench("device", tmp_path / "d", *words)
    assert len(result) == 8
    for targets in result.values():
        assert list(targets) == ["zswapfs", "zswapfs, file", "tmpfs", "tmpfs, file"]
        assert all(run["iops"] > 0 for runs in targets.values() for run in runs)


def _until(trap: str) -> list[str]:
    """Return the words of a load that does this when it is told to end."""
    return ["sh", "-c", f"trap '{trap}; exit 0' TERM; echo ready >&2; while :; do sleep 0.1; done"]


@pytest.mark.swapped
@pytest.mark.parametrize(
    ("words", "verdict", "is_good"),
    [
        (_until("echo 9 pages, 0 wrong, 12 compared"), daemons.COMPARED, True),
        (_until("echo 9 pages, 0 wrong, 0 compared"), daemons.COMPARED, False),
        (_until("echo 9 pages, 10 wrong, 12 compared"), daemons.COMPARED, False),
        (["sh", "-c", "echo ready; exec sleep 99"], daemons.COMPARED, False),
        (["sh", "-c", "echo ready; exec sleep 99"], None, True),
        (_until("echo verify: bad"), None, False),
        (["echo", "ready, 9 pages, 0 wrong, 12 compared"], daemons.COMPARED, False),
        (["echo", "ready"], None, False),
    ],
)
def test_loads_that_end(words: list[str], verdict: str | None, *, is_good: bool) -> None:
    """Only what ended when told to, and said what it should, has done its work."""
    with daemons.load("x", 64, *words, verdict=verdict) as load:
        assert load.process.stdout is not None
        assert load.process.stdout.read(5) == "ready"
        if words[0] == "echo":
            load.process.wait()
        assert (load.end() == []) == is_good


@pytest.mark.mounted
def test_the_kernels_log_is_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it says of trouble is found, before and after is not; nor is silence quiet."""
    Path("/dev/kmsg").write_text("zswapfs-tests: Oops, before\n")
    with daemons.kernel_log() as said:
        Path("/dev/kmsg").write_text("zswapfs-tests: Oops, meanwhile\n")
    assert [line.partition("Oops, ")[2] for line in said] == ["meanwhile"]
    (tmp_path / "dmesg").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "dmesg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(daemons, "LOG_SECONDS", 0.3)
    with daemons.kernel_log() as said:
        pass
    assert said == ["the kernel's log could not be followed"]


@pytest.mark.swapped
def test_recovery(tmp_path: Path) -> None:
    """Workers die under loads that compare, and nothing is wrong."""
    words = ("--kills", 2, "--mib", 128, "--limit", 80, "--warm-up", 8)
    _, result = _bench("recovery", tmp_path / "r", *words)
    assert result["wrong"] == []
    assert result["pages_swapped"] > 1000
    assert [len(each) for each in result["takeover_seconds"].values()] == [2, 2]


LOADS = ["fill", "random", "seqread", "rewrite", "four", "forks"]
SWAP = ("--rounds", "1", "--mib", "64", "--limit", "24", "--only", "zswapfs,transport,tmpfs")


def _state() -> list[str]:
    """Return what the benchmark must put back."""
    attached = subprocess.run(["losetup", "-l"], capture_output=True, text=True, check=True).stdout
    files = ("/proc/swaps", "/proc/sys/vm/page-cluster", "/proc/self/mounts")
    return [attached, *(Path(file).read_text() for file in files)]


@pytest.mark.swapped
def test_swap(tmp_path: Path) -> None:
    """Every load on every contender swaps, and the system is as it was."""
    before = _state()
    out, result = _bench("swap", tmp_path / "w", *SWAP)
    assert list(result["runs"]) == LOADS
    for of in result["runs"].values():
        assert list(of) == ["zswapfs@5", "transport@5", "tmpfs@5"]
        for (run,) in of.values():
            assert run["wrong"] == 0
            assert run["swapped_in"] + run["swapped_out"] > 0
            assert run["p50_us"] > 0
    assert "of transport" in out
    assert _state() == before


def _swapped_kb() -> int:
    """Return what the benchmark's swap holds; its priority is the highest."""
    lines = (line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:])
    return sum(int(words[3]) for words in lines if words[4] == "32767")


def _groups_of(pid: int) -> list[Path]:
    """Return the memory cgroups of a benchmark."""
    return list(Path("/sys/fs/cgroup").glob(f"**/zswapfs-bench-{pid}-*"))


@pytest.mark.swapped
def test_swap_interrupted(tmp_path: Path) -> None:
    """SIGTERM in the middle of a load: the system is as it was."""
    before = _state()
    script = TOP / "contrib" / "bench" / "swap"
    words = [sys.executable, script, "--output", tmp_path / "w", *SWAP, "--rounds", "50"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        end = time.monotonic() + 60
        while _swapped_kb() < 1000:
            assert running.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        assert _state() != before
        assert _groups_of(running.pid)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 128 + signal.SIGTERM
    assert _state() == before
    assert not _groups_of(running.pid)
