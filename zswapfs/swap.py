"""Loop device and swap: in the right order up, and in the reverse order down.

There is no state file. What is up is read from /proc/mounts, /sys/block and /proc/swaps, so a
step that was killed leaves nothing that the next one could not see.
"""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click

from .config import run_file
from .errors import ConfigError, SetupError
from .mount import FSTYPE, mount_source, proc_lines, unescape
from .protect import cgroups_below, hierarchies

TIMEOUT = 60
"""Seconds that any tool but swapoff may take."""
LABEL = "zswapfs"
SOURCE_UP = "zswapfs-up"
"""What /proc/mounts names a mount that ``up`` made: it may be taken down without a question."""
SOURCE_MOUNT = "zswapfs"
WAIT_FOR_LOCK = 60
"""Seconds."""
SWAPOFF_PAUSE = 0.2
"""Seconds."""
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", FSTYPE})
"""Filesystems whose files take memory, or swap."""
_LIMIT_V1, _LIMIT_V2 = "memory.limit_in_bytes", "memory.max"


@dataclass(frozen=True)
class Swap:
    """A line of /proc/swaps; sizes in bytes."""

    device: str
    size: int
    used: int
    priority: int


@dataclass(frozen=True)
class State:
    """What the system has of one mountpoint."""

    source: str | None
    """As /proc/mounts names it; None: no zswapfs is mounted there."""
    loops: tuple[str, ...]
    """Loop devices on its swap file."""
    swaps: tuple[Swap, ...]
    """Of these, which are swapped on."""


@dataclass(frozen=True)
class Group:
    """A memory cgroup that has a limit; bytes, with all below it."""

    path: Path
    swapped: int
    """Of its pages, what is in swap, whichever."""
    room: int
    """What it can take back: below its limit, and in place of its page cache."""


_held_locks: list[int] = []
"""Tools inherit these: what a killed command has begun is not over before its tool is."""


def run(*words: str, timeout: float | None = TIMEOUT) -> str:
    """Run a tool and return its output. Raises SetupError with its last line of complaint.

    Whatever interrupts it, the tool has ended before: some cannot be interrupted, and what they do
    has to be known. A terminal's ^C does not reach the tool itself: that would end it also where
    signals are ignored, to clean up.
    """
    tool = shutil.which(words[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if tool is None:
        raise SetupError(f"{words[0]}: not installed (packages util-linux and mount)")
    process = None
    try:
        with signals_deferred():  # or it might be there, and not be known
            process = subprocess.Popen(
                [tool, *words[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="surrogateescape",
                pass_fds=_held_locks,
                process_group=0,
                env={**os.environ, "LC_ALL": "C"},  # or what it says could not be told apart
            )
        out, complaint = process.communicate(timeout=timeout)
    except BaseException as error:
        if process is not None:
            with signals_deferred():
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
                process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise SetupError(f"{words[0]}: no answer in {timeout} s") from None
        raise
    if process.returncode:
        lines = complaint.strip().split("\n")
        raise SetupError(lines[-1] or f"{words[0]}: exit code {process.returncode}")
    return out


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Have SIGINT and SIGTERM come at the end. Not by a mask, which tools would inherit."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {
        number: signal.signal(number, lambda which, _frame: came.append(which))
        for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for which in came:
            signal.raise_signal(which)


def active_swaps() -> list[Swap]:
    """Return what /proc/swaps lists."""
    swaps = []
    for device, _, size, used, priority in proc_lines("/proc/swaps")[1:]:
        swaps.append(Swap(unescape(device), int(size) << 10, int(used) << 10, int(priority)))
    return swaps


def _backing_file(device: str) -> Path | None:
    """Return the file that a loop device is attached to, or None."""
    backing = Path("/sys/block") / Path(device).name / "loop/backing_file"
    try:
        path = backing.read_bytes().removesuffix(b"\n").removesuffix(b" (deleted)")
    except OSError:
        return None
    return Path(os.fsdecode(path))


def _is_on(device: str, file: Path) -> bool:
    """Say whether a loop device is attached to ``file``."""
    return _backing_file(device) == file


def _filesystem_of(file: Path) -> str:
    """Return the type of filesystem that a file is on, without a look at the file: it may hang."""
    lines = proc_lines("/proc/self/mounts")
    mounts = {Path(unescape(words[1])): words[2].decode() for words in lines}
    return next((mounts[folder] for folder in file.parents if folder in mounts), "")


def is_in_memory(device: str) -> bool:
    """Say whether what is swapped to a device takes memory again."""
    if re.fullmatch(r"/dev/z?ram\d+", device):
        return True
    file = _backing_file(device)
    return file is not None and _filesystem_of(file) in _IN_MEMORY


def loops_of(file: Path) -> list[str]:
    """Return the loop devices that are attached to ``file``."""
    devices = [f"/dev/{entry.name}" for entry in Path("/sys/block").glob("loop*")]
    return sorted(device for device in devices if _is_on(device, file))


def state_of(mountpoint: Path) -> State:
    """Look at the system."""
    loops = loops_of(mountpoint / "swap")
    swaps = [swap for swap in active_swaps() if swap.device in loops]
    return State(mount_source(mountpoint), tuple(loops), tuple(swaps))


def attach(file: Path) -> str:
    """Attach a loop device with direct I/O and 4096-byte sectors; return its name.

    Raises SetupError, with nothing attached, also where the kernel gave less than was asked for.
    """
    device = run(
        "losetup", "--direct-io=on", "--sector-size", "4096", "-f", "--show", str(file)
    ).strip()
    sysfs = Path("/sys/block") / Path(device).name
    direct = (sysfs / "loop/dio").read_text().strip()
    sector = (sysfs / "queue/logical_block_size").read_text().strip()
    if (direct, sector) != ("1", "4096"):
        detach(device, file)
        raise SetupError(f"{device}: direct I/O {direct}, sectors of {sector} bytes; both matter")
    # Completed on the CPU that asked: otherwise on the lane's, by a softirq thread in between.
    with suppress(OSError):
        (sysfs / "queue/rq_affinity").write_text("2")
    return device


def detach(device: str, file: Path) -> None:
    """Detach a loop device from ``file``, if it is on that, and wait until it is not."""
    try:
        if _is_on(device, file):
            run("losetup", "-d", device)
    except SetupError:
        if _is_on(device, file):  # and not gone by itself meanwhile
            raise
    for _ in range(100):
        if not _is_on(device, file):
            return
        time.sleep(0.02)
    raise SetupError(f"{device}: still in use")


def swap_on(device: str, priority: int) -> None:
    """Make swap and turn it on, with discard."""
    run("mkswap", "--label", LABEL, device)
    run("swapon", "--discard", "--priority", str(priority), device)


def available_bytes() -> int:
    """Return the memory that pages which come back from swap can use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {
        name: int(rest.split()[0]) << 10 for name, _, rest in (x.partition(":") for x in lines)
    }
    return values["MemAvailable"]


def _group_at(limit_file: Path) -> Group:
    group = limit_file.parent
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    if limit_file.name == _LIMIT_V2:
        prefix = ""
        used = int((group / "memory.current").read_text())
        swapped = int((group / "memory.swap.current").read_text())
    else:
        prefix = "total_"
        used = int((group / "memory.usage_in_bytes").read_text())
        swapped = int((group / "memory.memsw.usage_in_bytes").read_text()) - used
    cache = sum(int(stat[f"{prefix}{age}_file"]) for age in ("active", "inactive"))
    return Group(group, swapped, int(limit_file.read_text()) - used + cache)


def groups_below(root: Path) -> list[Group]:
    """Return the memory cgroups at and below ``root``, of either version, that have a limit."""
    found = []
    for group in cgroups_below(root):
        for name in (_LIMIT_V1, _LIMIT_V2):
            # Not this version's or gone by now (OSError), 'max' (ValueError), or with swap not
            # accounted (OSError).
            with suppress(OSError, ValueError):
                found.append(_group_at(group / name))
    return found


def crowded_group(groups: list[Group], need: int, others: int) -> Group | None:
    """Return a cgroup that has no room for its part of ``need`` bytes from swap, or None.

    What a limit keeps out of memory goes to other swap, which has ``others`` bytes for all cgroups.
    ``groups`` has each after those above it. What is kept out below a cgroup needs no room in it,
    and all of them together keep out no more than comes.
    """
    kept_out: dict[Path, int] = {}
    for group in reversed(groups):
        below = sum(size for path, size in kept_out.items() if group.path in path.parents)
        comes = min(group.swapped, need - sum(kept_out.values()) + below)
        over = comes - below - group.room
        if over > 0:
            kept_out[group.path] = over
        if sum(kept_out.values()) > others:
            return group
    return None


def _free_in(swaps: list[Swap]) -> int:
    return sum(swap.size - swap.used for swap in swaps)


def _check_room(mountpoint: Path, swaps: tuple[Swap, ...]) -> None:
    mine = {swap.device for swap in swaps}
    others = [swap for swap in active_swaps() if swap.device not in mine]
    need = sum(swap.used for swap in swaps)
    have = available_bytes() + _free_in([x for x in others if not is_in_memory(x.device)])
    if need > have:
        raise SetupError(
            f"{mountpoint}: {need >> 20} MiB are in swap and only {have >> 20} MiB of memory "
            "are free to take them back; nothing was changed"
        )
    groups = [group for tree in hierarchies(Path("/")) for group in groups_below(tree.mount)]
    # Swap in memory is as good as any to a cgroup's limit; that there is memory for it was seen to.
    if group := crowded_group(groups, need, _free_in(others)):
        raise SetupError(
            f"{mountpoint}: memory cgroup {group.path} has {group.swapped >> 20} MiB in swap "
            f"and room for {max(group.room, 0) >> 20} MiB: its processes would be killed; "
            "raise its limit; nothing was changed"
        )


def swap_off(mountpoint: Path, swaps: tuple[Swap, ...]) -> None:
    """Turn swap off, if memory can take the pages back. Raises SetupError with all left as it was.

    Where a memory cgroup's limit leaves no room, the kernel does not refuse: it kills what is in
    the cgroup. So that is looked at before, too.

    swapoff has no timeout: it reads every page back, and interrupted it leaves some behind.
    """
    if any(swap.used for swap in swaps):
        _check_room(mountpoint, swaps)
    for swap in swaps:
        _swapoff(swap.device)


def _swapoff(device: str) -> None:
    """Turn a device off, or wait until another swapoff has: systemd's own, at shutdown.

    While one is at work the device is listed as before, and for any other the kernel finds no such
    swap (EINVAL). If that one fails, the next one here gets to work, or its own error.
    """
    while True:
        try:
            run("swapoff", device, timeout=None)
        except SetupError as error:
            if all(swap.device != device for swap in active_swaps()):
                return
            if not str(error).endswith(os.strerror(errno.EINVAL)):
                raise
        else:
            return
        time.sleep(SWAPOFF_PAUSE)


def _wait_for_lock(fd: int, mountpoint: Path) -> None:
    end = time.monotonic() + WAIT_FOR_LOCK
    said = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise ConfigError(f"{mountpoint}: another command is at work") from None
        else:
            return
        if not said:
            click.echo(f"zswapfs: {mountpoint}: waiting for another command", err=True)
        said = True
        time.sleep(0.1)


@contextmanager
def exclusively(mountpoint: Path) -> Iterator[None]:
    """Let one command at a time change what is at ``mountpoint``; wait, and say so.

    The tools that it runs hold the lock, too, a daemon does not. Raises ConfigError after a minute.
    """
    fd = os.open(run_file(mountpoint, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _wait_for_lock(fd, mountpoint)
        _held_locks.append(fd)
        yield
    finally:
        _held_locks.clear()
        os.close(fd)
