"""Real swap under real load, from inside a memory cgroup."""

import random
import re
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TIMEOUT, Swapped, run

pytestmark = pytest.mark.swapped

LOAD = Path(__file__).with_name("load.py")


TROUBLE = r"loop|swap|fuse|hung|I/O error|BUG|WARNING|Oops|page allocation failure|rcu.*stall"


class Kernel:
    """What the kernel says from now on, and of what other tests may be using at the same time."""

    def __init__(self) -> None:
        self._mark = f"zswapfs-tests: {uuid.uuid4()}"
        Path("/dev/kmsg").write_text(self._mark)

    def said_of(self, device: str) -> list[str]:
        """Return the lines about swap, loop devices and FUSE, but those about other devices."""
        name = Path(device).name
        number = (Path("/sys/block") / name / "dev").read_text().strip()
        said = run("dmesg", "--decode").stdout.partition(self._mark)[2].splitlines()[1:]
        return [
            line
            for line in said
            if line.startswith("kern ")  # not what daemons of other mounts have put there
            and "callbacks suppressed" not in line  # whose, it does not say; the errors do
            and re.search(TROUBLE, line)
            and set(re.findall(r"\bloop\d+", line)) <= {name}
            and set(re.findall(r"\((7:\d+)[:)]", line)) <= {number}
        ]


def _expect(process: "object", code: int = 0) -> str:
    out, _ = process.communicate(timeout=2 * TIMEOUT)  # type: ignore[attr-defined]
    assert process.returncode == code, out  # type: ignore[attr-defined]
    return str(out)


def test_a_verifying_load_survives_and_its_memory_comes_back(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """640 MiB in a cgroup of 256 MiB: no wrong byte, no complaint, and 3 s later it is gone."""
    kernel = Kernel()
    swap = swapped_on("--size", "1G")
    sysfs = Path("/sys/block") / Path(swap.device).name
    assert (sysfs / "loop/dio").read_text() == "1\n"
    assert (sysfs / "queue/logical_block_size").read_text() == "4096\n"
    out = _expect(swap.load(256, sys.executable, LOAD, corpus_file, 640, 1))
    assert "163840 pages, 0 wrong" in out
    assert swap.stats()["NumWrites"] > 50_000
    time.sleep(3)
    stats = swap.stats()
    assert stats["PagesStored"] < 2000
    assert stats["MemUsedTotal"] < 8 << 10
    assert stats["FailedReads"] == stats["FailedWrites"] == stats["InvalidIO"] == 0
    mine = kernel.said_of(swap.device)
    assert any(f"on {swap.device}." in line and "SSDsc" in line for line in mine)
    assert not [x for x in mine if "Adding" not in x and "capacity change" not in x]


def test_freed_memory_comes_back_while_swap_is_in_use(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """Three loads, two of them end: within 5 s the arena is packed, with nobody asking."""
    swap = swapped_on("--size", "1G")
    stay = swap.load(64, sys.executable, LOAD, corpus_file, 160, 1, 40)
    _expect(swap.load(64, sys.executable, LOAD, corpus_file, 160, 2))
    _expect(swap.load(64, sys.executable, LOAD, corpus_file, 160, 3))
    time.sleep(5)
    raw = swap.raw()
    assert stay.poll() is None
    assert raw["pages_stored"] > 10_000
    assert raw["mem_used_bytes"] <= 1.05 * raw["compr_bytes"]
    stay.kill()
    stay.communicate()


def test_a_full_store_fails_writes_and_loses_nothing(
    swapped_on: Callable[..., Swapped], tmp_path: Path
) -> None:
    """Incompressible pages against the memory limit: the kernel keeps them, all verify."""
    noise = tmp_path / "noise.pages"
    noise.write_bytes(random.Random(1).randbytes(8 << 20))
    swap = swapped_on("--size", "512M", "--mem-limit", "16M")
    # More than fits: the load is killed by its cgroup, or gets through slowly; wrong it never is.
    load = swap.load(40, sys.executable, LOAD, noise, 64, 1)
    out, _ = load.communicate(timeout=2 * TIMEOUT)
    assert load.returncode in (0, -9, 137), out
    raw = swap.raw()
    assert raw["failed_writes"] > 0
    assert raw["mem_max_bytes"] <= 16 << 20
    assert raw["failed_reads"] == 0
    out = _expect(swap.load(35, sys.executable, LOAD, noise, 24, 2))
    assert " 0 wrong" in out
    assert swap.raw()["reads"] > raw["reads"] + 100


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_a_filesystem_on_the_loop_device(
    mount: Callable[..., Swapped], tmp_path: Path, kind: str
) -> None:
    """Made, filled, trimmed, checked."""
    mounted = mount(size="256M")
    done = run("losetup", "--direct-io=on", "--sector-size", "4096", "-f", "--show", mounted.file)
    device = done.stdout.strip()
    inside = tmp_path / "inside"
    inside.mkdir()
    try:
        assert run(f"mkfs.{kind}", "-q", device).returncode == 0
        assert run("mount", "-o", "discard", device, inside).returncode == 0
        noise = random.Random(2)
        files = {f"f{i}": noise.randbytes(1000) * noise.randrange(1, 3000) for i in range(60)}
        for name, content in files.items():
            (inside / name).write_bytes(content)
        assert run("umount", inside).returncode == 0
        assert run("mount", "-o", "discard", device, inside).returncode == 0
        for name, content in files.items():
            assert (inside / name).read_bytes() == content
        if kind == "btrfs":
            scrub = run("btrfs", "scrub", "start", "-B", inside)
            assert scrub.returncode == 0
            assert "no errors found" in scrub.stdout
        stored = mounted.raw()["pages_stored"]
        for name in files:
            (inside / name).unlink()
        assert run("sync", "-f", inside).returncode == 0  # before, ext4's blocks are not free
        assert run("fstrim", inside).returncode == 0
        assert run("umount", inside).returncode == 0
        assert mounted.raw()["pages_stored"] < stored / 10
        check = ["fsck.ext4", "-fn"] if kind == "ext4" else ["btrfs", "check"]
        assert run(*check, device).returncode == 0
    finally:
        run("umount", inside)
        run("losetup", "-d", device)


def test_fio_verifies_on_the_loop_device(mount: Callable[..., Swapped]) -> None:
    """Random 4 KiB to 128 KiB with depth 16, trims among them."""
    mounted = mount(size="128M")
    done = run("losetup", "--direct-io=on", "--sector-size", "4096", "-f", "--show", mounted.file)
    device = done.stdout.strip()
    try:
        fio = run(
            "fio", "--name=v", f"--filename={device}", "--rw=randrw", "--bsrange=4k-128k",
            "--direct=1", "--ioengine=libaio", "--iodepth=16", "--size=100m", "--verify=crc32c",
            "--verify_backlog=256",
            "--verify_state_save=0", "--io_size=160m", "--minimal", "--refill_buffers",
            "--buffer_compress_percentage=60",
        )  # fmt: skip
        assert fio.returncode == 0, fio.stdout + fio.stderr
        assert run("blkdiscard", device).returncode == 0
        assert mounted.raw()["pages_stored"] == 0
    finally:
        run("losetup", "-d", device)
