"""Which protections of a running daemon are in force, and which settings of the machine hurt.

Looks from outside, at /proc and /sys: what the daemon believes of itself is not asked. A
protection that is missing puts swap at risk; a setting that hurts costs speed or memory.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import swap
from .config import PAGE_BYTES
from .errors import ConfigError, SetupError
from .privileges import CAP_IPC_LOCK, give_up_capabilities
from .protect import (
    Hierarchy,
    cgroups_below,
    has_limit,
    hierarchies,
    memory_limits,
    sessions,
)
from .tune import PAGE_CLUSTER

OK, MISSING, WARN = "ok", "MISSING", "warn"

_MODULE = b"zswapfs.supervisor"
_ROLES = {"zswapfs": "supervisor", "zswapfs-worker": "worker"}
"""What the processes are called."""
_IO_FLUSHER = 0x00080000 | 0x00100000
"""PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE (include/linux/sched.h): what PR_SET_IO_FLUSHER sets."""
_UNKILLABLE = -1000
_UNLOCKABLE = frozenset({b"io", b"pf", b"mm", b"de", b"ht", b"dp"})
"""Flags of mappings that mlock() leaves out, like the vDSO's, and that the kernel never swaps.

The last one's pages (MAP_DROPPABLE, Linux 6.11: glibc's for random numbers) it drops instead."""
_RESEND_SINCE = (6, 9)
_SWAP_LIMITS = ("memory.swap.max", "memory.memsw.limit_in_bytes")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: str
    """OK, MISSING (a protection), or WARN (a setting that hurts)."""
    name: str
    text: str
    """What is so; where it is not well, then what to do."""


@dataclass(frozen=True)
class Process:
    """One of the daemon's two, as /proc shows it."""

    root: Path
    """Where /proc and /sys are."""
    pid: int
    role: str

    @property
    def folder(self) -> Path:
        """Its directory in /proc."""
        return self.root / "proc" / str(self.pid)

    @cached_property
    def status(self) -> dict[str, str]:
        """What /proc/PID/status says."""
        lines = (self.folder / "status").read_text(errors="surrogateescape").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def capabilities(self, name: str) -> int:
        """Return a set of capabilities, one bit each."""
        return int(self.status[name], 16)


def _command_lines(root: Path) -> Iterator[tuple[int, list[bytes]]]:
    for file in (root / "proc").glob("[0-9]*/cmdline"):
        try:
            yield int(file.parent.name), file.read_bytes().split(b"\0")
        except OSError:
            continue  # ended


def find_processes(mountpoint: Path, root: Path = Path("/")) -> dict[str, Process]:
    """Return what there is of a mount's ``supervisor`` and ``worker``."""
    place = os.fsencode(mountpoint)
    found: dict[str, Process] = {}
    for pid, words in sorted(_command_lines(root), reverse=True):
        if _MODULE in words and words[words.index(_MODULE) + 1] == place:
            role = _ROLES.get(_read(root / f"proc/{pid}/comm"))
            if role:
                found[role] = Process(root, pid, role)
    return found


def find_daemon(mountpoint: Path, root: Path = Path("/")) -> tuple[Process, Process]:
    """Return supervisor and worker of a mount. Raises SetupError when one is not there."""
    found = find_processes(mountpoint, root)
    for role in _ROLES.values():
        if role not in found:
            raise SetupError(f"{mountpoint}: its {role if found else 'daemon'} is gone")
    return found["supervisor"], found["worker"]


def _unlocked(process: Process) -> str | None:
    """Unlocked memory: mapping by mapping, for VmLck drifts with mremap() on some kernels.

    And what is in swap already.
    """
    unlocked = size = 0
    name, first = b"", b""
    for line in (process.folder / "smaps").read_bytes().split(b"\n"):
        if line.startswith(b"Size:"):
            size = int(line.split()[1])
        elif line.startswith(b"VmFlags:"):
            flags = set(line.split()[1:])
            if b"lo" not in flags and not flags & _UNLOCKABLE and not name.endswith(b" [vsyscall]"):
                unlocked += size
                first = first or name
        elif re.match(rb"[0-9a-f]+-", line):
            name = line
    if unlocked:
        what = os.fsdecode(first.split(b" ")[-1]) or "nameless"
        return f"{unlocked} kB can be swapped out ({what})"
    # With MCL_ONFAULT a lock does not bring back what had been swapped out before.
    swapped = process.status.get("VmSwap", "0 kB")
    return f"has {swapped} in swap" if swapped != "0 kB" else None


def _swappable_region(process: Process) -> str | None:
    """Swappable: a region elsewhere than on a tmpfs that is attached nowhere, which is noswap."""
    lines = (process.folder / "mountinfo").read_bytes().split(b"\n")
    mounts = {line.split(b" ")[0].decode() for line in lines}
    for link in (process.folder / "fd").iterdir():
        target = str(link.readlink())
        if target == "/memfd:zswapfs (deleted)":
            return "is only locked: pages can be swapped out when the worker dies"
        if re.fullmatch(r"/#\d+ \(deleted\)", target):
            info = (process.folder / "fdinfo" / link.name).read_text()
            if re.search(r"^mnt_id:\s*(\d+)$", info, re.MULTILINE)[1] not in mounts:  # type: ignore[index]
                return None
    return "holds no region"


def _no_io_flusher(process: Process) -> str | None:
    """Threads for which the kernel's allocations may wait for I/O."""
    threads = [
        int(file.read_text(errors="surrogateescape").rpartition(")")[2].split()[6])
        for file in (process.folder / "task").glob("*/stat")
    ]
    bare = sum(flags & _IO_FLUSHER != _IO_FLUSHER for flags in threads)
    return f"{bare} of {len(threads)} threads are not" if bare else None


def _killable(process: Process) -> str | None:
    """Killable by the OOM killer."""
    adjust = int((process.folder / "oom_score_adj").read_text())
    return f"oom_score_adj is {adjust}" if adjust != _UNKILLABLE else None


def _limited(process: Process) -> str | None:
    """Limits of memory cgroups that hold for it."""
    limits = memory_limits(process.pid, process.root)
    return f"limited by {limits[0]}" if limits else None


def _in_session(process: Process) -> str | None:
    """Cgroups whose processes are killed at logout, or early at shutdown."""
    found = sessions(process.pid, process.root)
    return f"ends with {found[0]}" if found else None


def _capable(process: Process) -> str | None:
    """Capabilities besides the one that locked memory needs."""
    more = process.capabilities("CapPrm") & ~(1 << CAP_IPC_LOCK)
    return f"holds {more.bit_count()} more than CAP_IPC_LOCK" if more else None


def _privileged(process: Process) -> str | None:
    """Privileges to be gained by executing something."""
    return "can gain some" if process.status["NoNewPrivs"] != "1" else None


def readable_unprivileged(file: Path) -> bool:
    """Say whether its own user, with no capability but CAP_IPC_LOCK, may read a process's file.

    The kernel shows a process's memory and environment to such only while it is dumpable, and
    only if it has no capability that they have not. Raises OSError when that cannot be told.
    """
    pid = os.fork()
    if pid == 0:
        code = errno.ENOTSUP
        try:
            give_up_capabilities()
            code = _error_of_reading(file)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, errno.EACCES, errno.EPERM):
        raise OSError(code, os.strerror(code))
    return code == 0


def _error_of_reading(file: Path) -> int:
    try:
        file.read_bytes()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _dumpable(process: Process) -> str | None:
    """Pages within reach of a core dump, or of a debugger without capabilities."""
    if _capable(process):
        return "cannot be told while it holds capabilities"
    return "is dumpable" if readable_unprivileged(process.folder / "environ") else None


@dataclass(frozen=True)
class _Protection:
    name: str
    complaint: Callable[[Process], str | None]
    """What is wrong with a process, or None."""
    good: str
    advice: str
    worker_only: bool = False

    def look(self, processes: tuple[Process, ...]) -> Finding:
        wrong = []
        for process in processes:
            if self.worker_only and process.role != "worker":
                continue
            try:
                text = self.complaint(process)
            except OSError as error:
                text = f"cannot be told ({error.strerror})"
            if text is not None:
                wrong.append(f"{process.role} {text}")
        if wrong:
            return Finding(MISSING, self.name, f"{', '.join(wrong)}; {self.advice}")
        return Finding(OK, self.name, self.good)


_RESOURCE = "start it with CAP_SYS_RESOURCE"
_PROTECTIONS = (
    _Protection("memory locked", _unlocked, "all of it", "start it again, with CAP_IPC_LOCK"),
    _Protection(
        "region", _swappable_region, "on a tmpfs that is never swapped", "needs Linux 6.4"
    ),
    _Protection("I/O flusher", _no_io_flusher, "all threads", _RESOURCE),
    _Protection("OOM killer", _killable, "held off", _RESOURCE),
    _Protection(
        "memory cgroups", _limited, "none limits it", "start it where no memory limit holds"
    ),
    _Protection("session", _in_session, "outlives any", "start it as a service (contrib/systemd)"),
    _Protection(
        "capabilities", _capable, "none but CAP_IPC_LOCK", "needs CAP_SETPCAP", worker_only=True
    ),
    _Protection(
        "no_new_privs", _privileged, "set", "start it again from this version", worker_only=True
    ),
    _Protection(
        "not dumpable", _dumpable, "no core, no debugger", "start it again from this version",
        worker_only=True,
    ),
)  # fmt: skip


def _read(file: Path) -> str:
    """Return a setting; nothing where the kernel has no such."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _kernel(root: Path) -> Finding:
    release = _read(root / "proc/sys/kernel/osrelease")
    version = re.match(r"(\d+)\.(\d+)", release)
    if version and (int(version[1]), int(version[2])) >= _RESEND_SINCE:
        return Finding(OK, "kernel", f"{release} sends requests again after a crash")
    text = f"{release}: a crash means errors for requests in flight; needs Linux 6.9"
    return Finding(MISSING, "kernel", text)


def _kernel_log(root: Path) -> str:
    """Return what the kernel still has of its log."""
    text = b""
    try:
        fd = os.open(root / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(fd, "rb", buffering=0) as log:
        while True:
            try:
                record = log.read(8192)
            except BrokenPipeError:
                continue  # overwritten before it was read; the next one is there
            if not record:
                return text.decode(errors="replace")
            text += record


def _has_freed(device: Path, state: swap.State, root: Path) -> bool:
    """Say whether the mount was told of freed clusters since it was made.

    By more than swapon's own discards, each of all that can be swapped to. The loop device's
    counters would tell of what it was used for before, too.
    """
    sizes = [each.size for each in state.swaps if each.device == str(device)]
    try:
        path = (root / "sys/block" / device.name / "loop/backing_file").read_bytes()
        file = root / os.fsdecode(path).removesuffix("\n").lstrip("/")
        pages = json.loads(file.with_name(".stats.json").read_bytes())["PagesDiscard"]
    except (OSError, ValueError):
        return False
    return bool(sizes) and pages % (sizes[0] // PAGE_BYTES) != 0


def _discard(device: Path, state: swap.State, root: Path) -> Finding:
    name = f"{device.name} discard"
    if _read(root / "sys/block" / device.name / "queue/discard_max_bytes") == "0":
        return Finding(WARN, name, "the device has none: freed pages stay; down, then up")
    said = re.findall(
        rf"swap on {device}\.  .* across:\w+ ?(\w*)$", _kernel_log(root), re.MULTILINE
    )
    if said and not re.fullmatch(r"(SS)?Ds?c", said[-1]):
        return Finding(WARN, name, "swap is on without: freed pages stay; swapon --discard")
    if not said and not _has_freed(device, state, root):
        text = "cannot be told: not in the kernel's log any more, and no cluster was freed yet"
        return Finding(WARN, name, text)
    return Finding(OK, name, "on")


def _loop(device: Path, state: swap.State, root: Path) -> Iterator[Finding]:
    folder = root / "sys/block" / device.name
    again = "losetup --direct-io=on --sector-size 4096"
    if _read(folder / "loop/dio") == "1":
        yield Finding(OK, f"{device.name} direct I/O", "on")
    else:
        text = f"off: each page is cached twice; {again}"
        yield Finding(WARN, f"{device.name} direct I/O", text)
    sector = _read(folder / "queue/logical_block_size")
    kind, advice = (OK, "") if sector == "4096" else (WARN, f", not 4096; {again}")
    yield Finding(kind, f"{device.name} sectors", f"{sector} bytes{advice}")
    yield _discard(device, state, root)


def _swaps(state: swap.State, root: Path) -> Iterator[Finding]:
    if not state.swaps:
        yield Finding(WARN, "swap", "not on; zswapfs up")
    for device in state.loops:
        yield from _loop(Path(device), state, root)


def _page_cluster(root: Path) -> Finding:
    value = _read(root / "proc/sys/vm/page-cluster")
    if value.isdigit() and int(value) < PAGE_CLUSTER:
        text = f"{value}: a request costs more than the pages in it; sysctl vm.page-cluster=5"
        return Finding(WARN, "page-cluster", text)
    return Finding(OK, "page-cluster", value or "none")


def _zswap(root: Path) -> Finding:
    if _read(root / "sys/module/zswap/parameters/enabled") in ("Y", "1"):
        text = "in front: pages are compressed twice; echo N >/sys/module/zswap/parameters/enabled"
        return Finding(WARN, "zswap", text)
    return Finding(OK, "zswap", "off")


def _swap_accounting(trees: list[Hierarchy]) -> Finding:
    """Look whether the kernel counts what each memory cgroup has in swap."""
    name = "swap accounting"
    if not trees:
        return Finding(WARN, name, "no memory cgroups: one program can fill all swap")
    for tree in trees:
        is_v1 = tree.controller == "memory"
        file = "memory.memsw.usage_in_bytes" if is_v1 else "memory.swap.current"
        groups = (
            [tree.mount] if is_v1 else [path.parent for path in tree.mount.glob("*/memory.max")]
        )
        if any(not (group / file).exists() for group in groups):
            text = (
                "off: one cgroup can fill all swap, and 'down' cannot see whose pages have no "
                "room; boot with swapaccount=1"
            )
            return Finding(WARN, name, text)
    return Finding(OK, name, "on")


def _swap_limits(trees: list[Hierarchy]) -> Finding:
    """Look whether any memory cgroup has a limit of what it may have in swap."""
    name = "swap limits"
    groups = (group for tree in trees for group in cgroups_below(tree.mount))
    if any(has_limit(group / file) for group in groups for file in _SWAP_LIMITS):
        return Finding(OK, name, "some cgroups have one")
    text = "none: one program can fill all swap; MemorySwapMax= for services that may grow"
    return Finding(WARN, name, text)


def _swap_cgroups(root: Path) -> Iterator[Finding]:
    trees = [
        tree
        for tree in hierarchies(root)
        if tree.controller == "memory"
        or "memory" in _read(tree.mount / "cgroup.controllers").split()
    ]
    accounting = _swap_accounting(trees)
    yield accounting
    if accounting.state == OK:  # or there is nothing to limit
        yield _swap_limits(trees)


def _sleep(root: Path) -> Finding:
    """Look whether CPUs can be kept out of the idle states that cost most to leave."""
    name = "CPU sleep"
    if (root / "dev/cpu_dma_latency").exists():
        return Finding(OK, name, "held off under load")
    text = "no /dev/cpu_dma_latency: swap-ins take longer"
    if " hypervisor" in _read(root / "proc/cpuinfo"):
        poll = "sys/module/haltpoll/parameters/guest_halt_poll_ns"
        text += f"; in this virtual machine, cpuidle_haltpoll and 200000 in /{poll}"
    return Finding(WARN, name, text)


def check_daemon(mountpoint: Path, root: Path = Path("/")) -> list[Finding]:
    """Return what there is to say of the daemon of a mount.

    ``root`` is where /proc, /sys and /dev are. Raises ConfigError when nothing is mounted there,
    SetupError when the daemon is gone.
    """
    state = swap.state_of(mountpoint)
    if state.source is None:
        raise ConfigError(f"{mountpoint}: no zswapfs is mounted there")
    return look(find_daemon(mountpoint, root), state, root)


def look(processes: tuple[Process, ...], state: swap.State, root: Path) -> list[Finding]:
    """Return what there is to say of these processes and loop devices."""
    return [
        *(protection.look(processes) for protection in _PROTECTIONS),
        _kernel(root),
        *_swaps(state, root),
        _page_cluster(root),
        _zswap(root),
        *_swap_cgroups(root),
        _sleep(root),
    ]
