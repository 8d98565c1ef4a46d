"""The benchmarks run, and report what they promise: tiny here, not to be read for speed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TOP


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
    assert result["sparse"]["table_bytes"] < 64 << 20


@pytest.mark.swapped
def test_device(tmp_path: Path) -> None:
    """Every job, on the loop device and on the file."""
    words = ("--rounds", 1, "--seconds", 0.1, "--mib", 16, "--only", "zswapfs,tmpfs")
    _, result = _bench("device", tmp_path / "d", *words)
    assert len(result) == 8
    for targets in result.values():
        assert list(targets) == ["zswapfs", "zswapfs, file", "tmpfs", "tmpfs, file"]
        assert all(run["iops"] > 0 for runs in targets.values() for run in runs)
