"""One worker's life: lock memory, open the store, start the lanes, run pyfuse3 until unmount."""

import ctypes
import gc
import logging
import os
import socket
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path

from .config import Options
from .stats import Stats
from .store import FuseSwitch, Store, SwitchOptions

MAX_REQUEST_BYTES = 256 << 10
SOCKET_BYTES = 4 << 20
SWAP_INODE = 2

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER = 57
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_M_ARENA_MAX = -8

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


def protect_memory() -> list[str]:
    """Keep the process out of the way of its own swap; return what could not be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    libc.mallopt(_M_ARENA_MAX, 1)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        missing.append(f"memory is not locked ({os.strerror(ctypes.get_errno())})")
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        missing.append(f"not an I/O flusher ({os.strerror(ctypes.get_errno())})")
    try:
        Path("/proc/self/oom_score_adj").write_text("-1000")
    except OSError as error:
        missing.append(f"the OOM killer is not held off ({error.strerror})")
    return missing


def own_memory(pids: list[int]) -> int:
    """Return the bytes that processes have resident besides the region, shared ones by share."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("Pss_Anon", "Pss_File"):
                    total += int(value.split()[0]) << 10
    return total


def take_stats(store: Store) -> Stats:
    """Return the store's statistics with the daemon's own beside them."""
    return store.stats(daemon_rss=own_memory([os.getpid(), os.getppid()]))


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SOCKET_BYTES)
        end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, SOCKET_BYTES)
    return ours, theirs


def _latency_fd() -> int:
    """Return /dev/cpu_dma_latency, open for writing, or -1: not every kernel has PM QoS.

    Whatever is asked for through it ends with this process.
    """
    try:
        return os.open("/dev/cpu_dma_latency", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _control_plane(
    store: Store, options: Options, switch: FuseSwitch, fds: tuple[int, int], ready: FileIO
) -> None:
    """Run pyfuse3 and the policy task until the switch says that the kernel has unmounted.

    ``fds``: pyfuse3's end of the socket, and the switch's eventfd. ``ready`` is told when the
    file is usable, and closed.
    """
    import pyfuse3  # noqa: PLC0415 the lanes serve already while these load
    import trio  # noqa: PLC0415

    from .compaction import compaction_task  # noqa: PLC0415
    from .filesystem import Filesystem  # noqa: PLC0415

    socket_fd, end_fd = fds

    async def announce() -> None:
        while not switch.ready:  # noqa: ASYNC110 a few milliseconds, once
            await trio.sleep(0.002)
        gc.collect()
        gc.freeze()
        gc.disable()
        ready.write(b"ready\n")
        ready.close()

    async def compact() -> None:
        try:
            await compaction_task(store, options)
        except Exception:
            # A policy is no reason to lose the mount's names and statistics.
            log.exception("compaction has ended; '.compact' still works")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(announce)
            nursery.start_soon(pyfuse3.main)
            nursery.start_soon(compact)
            await trio.lowlevel.wait_readable(end_fd)
            pyfuse3.terminate()
            nursery.cancel_scope.cancel()

    filesystem = Filesystem(store, partial(take_stats, store))
    pyfuse3.init(filesystem, f"/dev/fd/{socket_fd}", set())
    try:
        trio.run(main)
    finally:
        pyfuse3.close(unmount=False)


def run(options: Options, fuse_fd: int, region_fd: int, ready_fd: int) -> int:
    """Serve one mount until it is unmounted; return the process's exit code.

    ``ready_fd`` gets a line when the file is usable, and before it one for each protection that
    could not be had. Raises whatever keeps the file from becoming usable.
    """
    log_handler = _KernelLog()
    log_handler.setFormatter(logging.Formatter("zswapfs: %(message)s"))
    logging.basicConfig(handlers=[log_handler])
    ready = FileIO(ready_fd, "w")
    missing = protect_memory()
    if missing:
        ready.write(f"note: {'; '.join(missing)}\n".encode())
    ours, theirs = _pair()
    end_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    store = Store(options.nr_pages, options.mem_limit, reserve=options.reserve, fd=region_fd)
    switch = FuseSwitch(
        store,
        SwitchOptions(
            fuse_fd=fuse_fd,
            socket_fd=ours.fileno(),
            end_fd=end_fd,
            latency_fd=_latency_fd() if options.awake else -1,
            nr_lanes=options.lanes,
            spin_us=options.spin_us,
            max_request_bytes=MAX_REQUEST_BYTES,
            swap_inode=SWAP_INODE,
        ),
    )
    try:
        _control_plane(store, options, switch, (theirs.detach(), end_fd), ready)
    except Exception:
        if not ready.closed:
            raise
        # Pages must go on: whoever has some in swap would die with the lanes.
        log.exception("the control plane ended; pages are served until the unmount")
    switch.join()
    store.close()
    return 0
