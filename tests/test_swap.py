"""What the system says about swap, as read from its files."""

import os
from pathlib import Path

import pytest
from conftest import run

from zswapfs.swap import Group, crowded_group, groups_below, is_in_memory

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


def _crowded(need: int, others: int, **groups: tuple[int, int]) -> str | None:
    found = [Group(Path("/", name.replace("_", "/")), *sizes) for name, sizes in groups.items()]
    group = crowded_group(found, need, others)
    return None if group is None else str(group.path)


def test_what_has_room() -> None:
    """In the cgroup or in other swap; no more comes than is in this swap."""
    assert _crowded(9, 0, a=(9, 9)) is None
    assert _crowded(9, 0, a=(9, 8)) == "/a"
    assert _crowded(9, 1, a=(9, 8)) is None
    assert _crowded(8, 0, a=(9, 8)) is None


def test_other_swap_is_shared() -> None:
    """By all cgroups, which cannot push more into it than comes at all."""
    assert _crowded(9, 6, a=(3, 0), b=(3, 0)) is None
    assert _crowded(9, 5, a=(3, 0), b=(3, 0)) == "/a"
    assert _crowded(3, 3, a=(3, 0), b=(3, 0)) is None
    assert _crowded(3, 2, a=(3, 0), b=(3, 0)) == "/b"


def test_a_cgroup_below_another() -> None:
    """What the inner limit keeps out needs no room in the outer one; what it lets in does."""
    assert _crowded(9, 4, a=(4, 0), a_b=(4, 0)) is None
    assert _crowded(9, 4, a=(4, 2), a_b=(4, 0)) is None
    assert _crowded(9, 3, a=(4, 2), a_b=(4, 0)) == "/a/b"
    assert _crowded(9, 3, a=(4, 0), a_b=(4, 2)) == "/a"
    assert _crowded(9, 4, a=(4, 0), a_b=(2, 0), a_c=(2, 1)) is None
    assert _crowded(9, 3, a=(4, 0), a_b=(2, 0), a_c=(2, 1)) == "/a"


@pytest.mark.swapped
@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_a_loop_device_on_a_file_in_memory(place: Path, kind: str) -> None:
    """Also when the file is deleted."""
    assert run("mount", "-t", kind, "none", place).returncode == 0
    try:
        file = place / "a b"
        file.write_bytes(bytes(1 << 20))
        device = run("losetup", "-f", "--show", file).stdout.strip()
        assert is_in_memory(device)
        file.unlink()
        assert is_in_memory(device)
        assert run("losetup", "-d", device).returncode == 0
    finally:
        run("umount", place)


def test_swap_in_memory_by_its_name() -> None:
    """Others of the kind are disks."""
    assert is_in_memory("/dev/zram0")
    assert is_in_memory("/dev/ram12")
    for disk in ("/dev/sda2", "/dev/dm-0", "/swapfile", "/zram0"):
        assert not is_in_memory(disk)
