"""vm.page-cluster: raised for a while, and put back."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Swapped, zswapfs

from zswapfs.tune import PAGE_CLUSTER, PageCluster

SYSCTL = Path("/proc/sys/vm/page-cluster")
A, B = Path("/a"), Path(os.fsdecode(b"/b \xff"))


@pytest.fixture
def sysctl(tmp_path: Path) -> Path:
    """Return a file that stands for the sysctl, at the kernel's default."""
    path = tmp_path / "page-cluster"
    path.write_text("3\n")
    return path


@pytest.fixture
def tune(sysctl: Path) -> Callable[[], PageCluster]:
    """Return what makes the object of a new process."""
    return lambda: PageCluster(sysctl, sysctl.parent / "run" / "state")


def test_raised_and_put_back(sysctl: Path, tune: Callable[[], PageCluster]) -> None:
    """By the one who raised it, once."""
    tune().raise_for(A)
    assert tune().value() == PAGE_CLUSTER
    tune().give_up(B)
    assert tune().value() == PAGE_CLUSTER
    tune().give_up(A)
    assert tune().value() == 3
    sysctl.write_text("7")
    tune().give_up(A)
    assert tune().value() == 7


def test_the_last_of_two_puts_it_back(tune: Callable[[], PageCluster]) -> None:
    """In either order; asking twice is asking once."""
    for first, last in ((A, B), (B, A)):
        tune().raise_for(A)
        tune().raise_for(B)
        tune().raise_for(B)
        tune().give_up(first)
        assert tune().value() == PAGE_CLUSTER
        tune().give_up(last)
        assert tune().value() == 3


def test_what_somebody_else_has_set_stays(sysctl: Path, tune: Callable[[], PageCluster]) -> None:
    """Meanwhile, or from the beginning."""
    tune().raise_for(A)
    sysctl.write_text("2")
    tune().give_up(A)
    assert tune().value() == 2
    sysctl.write_text("6")
    tune().raise_for(A)
    assert tune().value() == 6
    tune().give_up(A)
    assert tune().value() == 6


def test_a_damaged_file_is_as_none(sysctl: Path, tune: Callable[[], PageCluster]) -> None:
    """Nothing is put back, and the next one works."""
    tune().raise_for(A)
    (sysctl.parent / "run" / "state").write_text('{"befo')
    tune().give_up(A)
    assert tune().value() == PAGE_CLUSTER
    sysctl.write_text("1")
    tune().raise_for(A)
    tune().give_up(A)
    assert tune().value() == 1


@pytest.mark.swapped
def test_up_tunes_and_down_restores(swapped_on: Callable[..., Swapped], place: Path) -> None:
    """And an 'up' that fails; without --tune it is recommended, in one line."""
    before = SYSCTL.read_text()
    SYSCTL.write_text("2")
    try:
        swap = swapped_on("--size", "64M", "--tune")
        assert int(SYSCTL.read_text()) == PAGE_CLUSTER
        assert zswapfs("down", swap.path).returncode == 0
        assert int(SYSCTL.read_text()) == 2
        assert zswapfs("up", place, "--size", "16K", "--tune").returncode == 1
        assert int(SYSCTL.read_text()) == 2
        done = zswapfs("up", place, "--size", "64M")
        assert done.returncode == 0
        assert f"vm.page-cluster is 2, {PAGE_CLUSTER} is faster: 'up --tune'" in done.stderr
        assert int(SYSCTL.read_text()) == 2
        assert zswapfs("down", place).returncode == 0
    finally:
        SYSCTL.write_text(before)
