"""With --strict: all protections, or nothing at all."""

import os
from pathlib import Path

import pytest
from conftest import ZSWAPFS, Mounted, run, zswapfs

LACKING = ("setpriv", "--inh-caps=-all", "--bounding-set=-sys_resource")
"""What makes any machine one where PR_SET_IO_FLUSHER and the OOM killer cannot be had."""


def may_have_resources() -> bool:
    """Say whether this process has CAP_SYS_RESOURCE."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) & 1 << 24)


def _is_refused(place: Path, *words: object) -> None:
    done = run(*LACKING, ZSWAPFS, *words)
    assert done.returncode == 1, done
    line, end = done.stderr.split("\n")
    assert end == ""
    assert "strict: " in line
    assert "not an I/O flusher (" in line
    assert "the OOM killer is not held off (" in line
    assert done.stdout == ""
    assert not place.is_mount()
    assert Mounted(place).daemon() == []


@pytest.mark.mounted
@pytest.mark.parametrize("words", [("--strict",), ("-o", "size=64M,strict=1"), ("-f", "--strict")])
def test_mount_refuses(place: Path, words: tuple[str, ...]) -> None:
    """Each missing protection is on the one line; nothing is mounted, nobody stays."""
    _is_refused(place, "mount", place, *words)


@pytest.mark.swapped
def test_up_refuses(place: Path) -> None:
    """Before there is a loop device."""
    _is_refused(place, "up", place, "--size", "64M", "--strict")
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        assert not backing.read_text().startswith(str(place))


@pytest.mark.mounted
def test_without_it_what_is_missing_is_told(place: Path) -> None:
    """The same machine, and it goes on."""
    done = run(*LACKING, ZSWAPFS, "mount", place, "-o", "size=64M,strict=0")
    assert done.returncode == 0, done.stderr
    assert "not an I/O flusher (" in done.stderr
    assert len(Mounted(place).daemon()) == 2


@pytest.mark.mounted
@pytest.mark.skipif(
    os.geteuid() != 0 or not may_have_resources(), reason="no CAP_SYS_RESOURCE to be had here"
)
def test_strict_where_all_can_be_had(place: Path) -> None:
    """Nothing is said then."""
    done = zswapfs("mount", place, "-o", "size=64M", "--strict")
    assert (done.returncode, done.stderr) == (0, "")
