"""What the system says about swap, as read from its files."""

import os
from pathlib import Path

import pytest

from zswapfs.swap import Group, groups_below

MIB = 1 << 20


def _make(group: Path, **files: object) -> Path:
    group.mkdir(parents=True)
    for name, content in files.items():
        (group / f"memory.{name}").write_text(f"{content}\n")
    return group


def test_groups_of_version_2(tmp_path: Path) -> None:
    """Those with a limit; page cache is room."""
    stat = f"anon {50 * MIB}\ninactive_file {3 * MIB}\nactive_file {2 * MIB}\nslab 1"
    inner = _make(
        tmp_path / "a.slice" / "b.service",
        max=64 * MIB, current=60 * MIB, **{"swap.current": 7 * MIB}, stat=stat,
    )  # fmt: skip
    _make(tmp_path / "c", max="max", current=MIB, **{"swap.current": MIB}, stat=stat)
    _make(tmp_path / "swap not accounted", max=MIB, current=MIB, stat=stat)
    assert groups_below(tmp_path) == [Group(inner, 7 * MIB, 9 * MIB)]


def test_groups_of_version_1(tmp_path: Path) -> None:
    """Swap is what memory and swap together are above memory; totals include those below."""
    stat = f"inactive_file 1\ntotal_inactive_file {MIB}\ntotal_active_file 0"
    group = _make(
        tmp_path / "a",
        limit_in_bytes=64 * MIB, usage_in_bytes=64 * MIB, stat=stat,
        **{"memsw.usage_in_bytes": 80 * MIB},
    )  # fmt: skip
    assert groups_below(tmp_path) == [Group(group, 16 * MIB, MIB)]


def test_a_group_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it was listed, before it is looked into: the others are found."""
    stat = "inactive_file 0\nactive_file 0"
    files = {"max": 2 * MIB, "current": MIB, "swap.current": MIB, "stat": stat}
    group = _make(tmp_path / "b", **files)
    (tmp_path / "a").mkdir()
    scandir = os.scandir

    def late(folder: str | Path) -> object:
        if Path(folder).name == "a":
            Path(folder).rmdir()
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", late)
    assert groups_below(tmp_path) == [Group(group, MIB, MIB)]
    assert not (tmp_path / "a").exists()
