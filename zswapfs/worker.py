"""One worker's life: lock memory, adopt the store, start the lanes, run pyfuse3 until unmount.

All that it needs is loaded by its supervisor, before the fork: the next worker must not depend on
what a disk or an upgrade has meanwhile made of the installed files.
"""

import ctypes
import fcntl
import gc
import logging
import os
import re
import select
import socket
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from . import compaction, filesystem
from .config import Options
from .mount import MAX_REQUEST_BYTES
from .privileges import give_up_capabilities, keep_out_others
from .stats import Stats
from .store import FuseSwitch, Store, SwitchOptions

SOCKET_BYTES = 4 << 20
SWAP_INODE = 2

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER = 57
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFERS = ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF))
_M_ARENA_MAX = -8
_FUSE_DEV_IOC_CLONE = 0x8004E500

FAILED = 3
"""Exit code of a worker whose control plane has failed."""

TakeStats = Callable[[], Stats]

log = logging.getLogger("zswapfs")


class _KernelLog(logging.Handler):
    """Standard error, which is /dev/kmsg for a daemon: few records, each of 1024 bytes at most."""

    RECORD_BYTES = 900

    def emit(self, record: logging.LogRecord) -> None:
        """Write as few pieces as that takes, of whole lines."""
        pieces = [b""]
        for line in self.format(record).encode().splitlines(keepends=True):
            if len(pieces[-1]) + len(line) > self.RECORD_BYTES:
                pieces.append(b"")
            pieces[-1] += line[: self.RECORD_BYTES]
        with suppress(OSError):
            for piece in pieces:
                os.write(2, piece)


def _would_wait(fd: int) -> bool:
    """Say whether somebody has to read first. /dev/kmsg takes all, but poll() does not say so."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)):
        return False
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return not poll.poll(0)


def write_line(fd: int, line: str) -> None:
    """Write to whoever listens; to nobody if nobody does, or reads so late that it would wait."""
    with suppress(OSError):
        if not _would_wait(fd):
            os.write(fd, f"{line}\n".encode(errors="surrogateescape"))


def protect_memory(*, bring_in: bool = False) -> list[str]:
    """Keep the process out of the way of its own swap; return what could not be had.

    ``bring_in``: what is in swap already comes back now. Locking on fault leaves it there, and who
    is about to end the worker that serves it would wait for it for ever.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    libc.mallopt(_M_ARENA_MAX, 1)
    if bring_in:
        libc.mlockall(_MCL_CURRENT)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        missing.append(f"memory is not locked ({os.strerror(ctypes.get_errno())})")
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        missing.append(f"not an I/O flusher ({os.strerror(ctypes.get_errno())})")
    try:
        Path("/proc/self/oom_score_adj").write_text("-1000")
    except OSError as error:
        missing.append(f"the OOM killer is not held off ({error.strerror})")
    return missing


def has_resend() -> bool:
    """Say whether the kernel can send again what a dead worker had under way: Linux 6.9."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and tuple(map(int, found.groups())) >= (6, 9)


def clone_fuse(fd: int) -> int:
    """Return another descriptor of the same mount; closing it ends the requests read from it."""
    clone = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(clone, _FUSE_DEV_IOC_CLONE, struct.pack("I", fd))
    return clone


def open_own_memory() -> int:
    """Return a descriptor of what this process has resident, or -1 without one.

    To be opened before others are kept out: they are kept out of this, too.
    """
    try:
        return os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


class OwnMemory:
    """What processes have resident besides the region; each opened its descriptor itself."""

    def __init__(self, *fds: int) -> None:
        self._fds = [fd for fd in fds if fd >= 0]

    def total(self) -> int:
        """Return the sum of their proportional set sizes, in bytes: what they share counts once."""
        total = 0
        for fd in self._fds:
            with suppress(OSError):
                for line in os.pread(fd, 4096, 0).decode().splitlines():
                    name, _, value = line.partition(":")
                    if name in ("Pss_Anon", "Pss_File"):
                        total += int(value.split()[0]) << 10
        return total


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        for force, ask in _BUFFERS:
            try:
                end.setsockopt(socket.SOL_SOCKET, force, SOCKET_BYTES)
            except PermissionError:  # no CAP_NET_ADMIN: as much as anybody may have
                end.setsockopt(socket.SOL_SOCKET, ask, SOCKET_BYTES)
    return ours, theirs


def _latency_fd() -> int:
    """Return /dev/cpu_dma_latency, open for writing, or -1: not every kernel has PM QoS.

    Whatever is asked for through it ends with this process.
    """
    try:
        return os.open("/dev/cpu_dma_latency", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return -1


@dataclass(frozen=True)
class Job:
    """What a supervisor gives a worker; the descriptors stay its own."""

    options: Options
    fuse_fd: int
    region_fd: int
    says_fd: int
    """Gets lines: ``serving`` when pages are served, ``ready`` when the names are there, too;
    ``error: ...``."""
    memory_fd: int
    """The supervisor's ``open_own_memory``."""
    restarts: int
    """Workers that were there before."""
    names: bool = True
    """False: serve pages only, and answer all else with EIO."""

    def say(self, line: str) -> None:
        """Tell the supervisor."""
        write_line(self.says_fd, line)


def _control_plane(
    store: Store, job: Job, switch: FuseSwitch, fds: tuple[int, int], take_stats: TakeStats
) -> None:
    """Run pyfuse3 and the policy task until the switch says that the kernel has unmounted.

    ``fds``: pyfuse3's end of the socket (-1: there shall be no pyfuse3), and the switch's eventfd.
    """
    socket_fd, end_fd = fds

    async def announce() -> None:
        while not switch.ready:  # noqa: ASYNC110 a few milliseconds, once
            await trio.sleep(0.002)
        gc.collect()
        gc.freeze()
        gc.disable()
        job.say("ready")

    async def compact() -> None:
        try:
            await compaction.compaction_task(store, job.options)
        except Exception:
            # A policy is no reason to lose the mount's names and statistics.
            log.exception("compaction has ended; '.compact' still works")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(compact)
            if socket_fd >= 0:
                nursery.start_soon(announce)
                nursery.start_soon(pyfuse3.main)
            await trio.lowlevel.wait_readable(end_fd)
            if socket_fd >= 0:
                pyfuse3.terminate()
            nursery.cancel_scope.cancel()

    if socket_fd < 0:
        trio.run(main)
        return
    operations = filesystem.Filesystem(store, take_stats, job.restarts)
    pyfuse3.init(operations, f"/dev/fd/{socket_fd}", set())
    try:
        trio.run(main)
    finally:
        pyfuse3.close(unmount=False)


def _start_log() -> None:
    handler = _KernelLog()
    handler.setFormatter(logging.Formatter("zswapfs: %(message)s"))
    logging.basicConfig(handlers=[handler])


def _start_switch(store: Store, job: Job, fds: tuple[int, int, int, int]) -> FuseSwitch:
    fuse_fd, socket_fd, end_fd, latency_fd = fds
    return FuseSwitch(
        store,
        SwitchOptions(
            fuse_fd=fuse_fd,
            socket_fd=socket_fd,
            end_fd=end_fd,
            latency_fd=latency_fd,
            nr_lanes=job.options.lanes,
            spin_us=job.options.spin_us,
            max_request_bytes=MAX_REQUEST_BYTES,
            swap_inode=SWAP_INODE,
        ),
    )


def run(job: Job) -> int:
    """Serve one mount until it is unmounted; return 0 then.

    Returns FAILED when the control plane has failed: what it has not answered can be answered by
    the next worker only. Raises whatever keeps pages from being served.
    """
    protect_memory()
    _start_log()
    fuse_fd = job.fuse_fd if has_resend() else clone_fuse(job.fuse_fd)
    ours, theirs = _pair()
    end_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    latency_fd = _latency_fd() if job.options.awake else -1
    memory = OwnMemory(job.memory_fd, open_own_memory())
    keep_out_others()
    give_up_capabilities()

    if not job.names:
        theirs.close()
    store = Store.adopt(job.region_fd)
    switch = _start_switch(store, job, (fuse_fd, ours.fileno(), end_fd, latency_fd))
    job.say("serving")
    socket_fd = theirs.detach() if job.names else -1

    def take_stats() -> Stats:
        return store.stats(daemon_rss=memory.total(), restarts=job.restarts)

    try:
        _control_plane(store, job, switch, (socket_fd, end_fd), take_stats)
    except Exception:
        if not switch.ready and not job.restarts:
            raise
        log.exception("the control plane ended")
        return FAILED
    switch.join()
    store.close()
    return 0
