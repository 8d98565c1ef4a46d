"""The units: what systemd says of them, and whether zswapfs works within their limits."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sandbox
from conftest import TIMEOUT, TOP, ZSWAPFS, Swapped, run, zswapfs
from test_strict import may_have_resources

UNIT = TOP / "contrib/systemd/zswapfs.service"
LOAD = Path(__file__).with_name("load.py")

if shutil.which("systemd-analyze") is None and not os.environ.get("CI"):
    pytest.skip("no systemd-analyze", allow_module_level=True)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Return a copy of the unit that runs what is tested here."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/usr/local/sbin/zswapfs", str(ZSWAPFS)))
    return copy


def test_systemd_finds_no_fault(unit: Path) -> None:
    """No unknown directive, no missing program, no cycle in the order of units."""
    done = run("systemd-analyze", "verify", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_exposure(unit: Path) -> None:
    """At most 3.0, as systemd counts."""
    done = run("systemd-analyze", "security", "--offline=true", "--threshold=30", unit)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_the_mount_is_seen_outside() -> None:
    """Nothing asks for a mount namespace, in which mount and loop device's file would be hidden."""
    directives = sandbox.directives(UNIT)
    assert directives["PrivateMounts"] == ["no"]
    hiding = (
        "ProtectSystem",
        "ProtectHome",
        "ProtectKernel",
        "ProtectControlGroups",
        "ProtectProc",
    )
    hiding += ("ProcSubset", "PrivateTmp", "PrivateDevices", "PrivateIPC", "PrivateUsers", "Bind")
    hiding += ("ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths")
    hiding += ("TemporaryFileSystem", "RuntimeDirectory", "StateDirectory", "Root", "MountFlags")
    hiding += ("LogNamespace", "DynamicUser", "PrivateBPF", "PrivatePIDs")
    assert [name for name in directives if name.startswith(hiding)] == []


@pytest.fixture
def restricted(unit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each command of the test run as the unit would run it."""
    script = tmp_path / "zswapfs"
    python = f"{sys.executable} {Path(sandbox.__file__)}"
    script.write_text(f'#!/bin/sh\nexec {python} {unit} {ZSWAPFS} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setattr("conftest.ZSWAPFS", script)


@pytest.mark.swapped
@pytest.mark.usefixtures("restricted")
def test_all_works_within_the_units_limits(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """Swap under load, a worker that dies, a restart, and the way down."""
    swap = swapped_on("--size", "512M")
    load = swap.load(64, sys.executable, LOAD, corpus_file, 160, 5, 100)
    os.kill(max(swap.daemon()), signal.SIGKILL)
    end = time.monotonic() + 2 * TIMEOUT
    while swap.stats()["Restarts"] < 1 or swap.stats()["PagesStored"] < 10_000:
        assert time.monotonic() < end
        time.sleep(0.05)
    done = zswapfs("restart", swap.path)
    assert done.returncode == 0, done.stderr
    load.send_signal(signal.SIGUSR1)
    out, _ = load.communicate(timeout=2 * TIMEOUT)
    assert (load.returncode, " 0 wrong" in out) == (0, True), out
    (swap.path / ".compact").write_text("1")
    found = {
        each["name"]: each for each in json.loads(run(ZSWAPFS, "check", "--json", swap.path).stdout)
    }
    refused = set() if may_have_resources() else {"I/O flusher", "OOM killer"}
    assert {name for name, each in found.items() if each["state"] == "MISSING"} == refused
    for process in swap.daemon():
        status = Path(f"/proc/{process}/status").read_text()
        assert "Seccomp:\t2" in status
    done = zswapfs("down", swap.path)
    assert done.returncode == 0, done.stderr
