"""Holds /dev/fuse and the region, and forks the worker that uses them.

A program of its own, so that nothing of the command line stays in memory with it:

    python -P -m zswapfs.supervisor MOUNTPOINT FUSE_FD READY_FD OPTIONS
"""

import ctypes
import errno
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from . import worker
from .config import Options, parse_options
from .errors import SetupError, ZswapfsError
from .store import region_memory

_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def mount_fuse(mountpoint: Path, source: str) -> int:
    """Mount an empty FUSE filesystem; return the descriptor that its requests come from.

    ``source`` is what /proc/mounts will name it. Raises SetupError.
    """
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SetupError(f"/dev/fuse: {error.strerror}; is the fuse module there?") from None
    words = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions"
    words += f",max_read={worker.MAX_REQUEST_BYTES}"
    flags = _MS_NOSUID | _MS_NODEV
    target = os.fsencode(mountpoint)
    if _libc.mount(source.encode(), target, b"fuse.zswapfs", flags, words.encode()):
        reason = os.strerror(ctypes.get_errno())
        os.close(fd)
        raise SetupError(f"{mountpoint}: cannot mount: {reason}")
    return fd


def unmount(mountpoint: Path, *, lazily: bool = False) -> None:
    """Unmount. Raises OSError (EBUSY: in use)."""
    if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH if lazily else 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(mountpoint))


def command(mountpoint: Path, options: Options, fuse_fd: int, ready_fd: int) -> list[str]:
    """Return what to run as the daemon; both descriptors must be open in it.

    ``ready_fd`` gets lines: ``note: ...``, then ``ready`` or ``error: ...``.
    """
    # -P: the current directory may hold a zswapfs that is not built.
    python = [sys.executable, "-P", "-m", "zswapfs.supervisor"]
    return [*python, str(mountpoint), str(fuse_fd), str(ready_fd), options.words()]


def complain(text: str) -> None:
    """Say something on standard error, which for a daemon is the kernel's log."""
    os.write(sys.stderr.fileno(), f"zswapfs: {text}\n".encode())


def _worker_main(options: Options, fds: tuple[int, int, int]) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = worker.run(options, *fds)
    except BaseException as error:  # noqa: BLE001 the last chance to say anything
        with suppress(OSError):
            os.write(fds[2], f"error: {error}\n".encode())
    finally:
        os._exit(code)


def serve(mountpoint: Path, options: Options, fuse_fd: int, ready_fd: int) -> int:
    """Run the daemon until the unmount; return its exit code.

    SIGTERM and SIGINT unmount, if nobody uses the mount; under live swap they change nothing.
    """
    region_fd, noswap = region_memory()
    if not noswap:
        text = "note: no noswap tmpfs (Linux 6.4): the region is only locked; not safe to recover\n"
        os.write(ready_fd, text.encode())

    def stop(number: int, frame: object) -> None:
        del number, frame
        try:
            unmount(mountpoint)
        except OSError as error:
            if error.errno != errno.EINVAL:
                complain(f"{mountpoint}: {error.strerror}; goes on")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    pid = os.fork()
    if pid == 0:
        _worker_main(options, (fuse_fd, region_fd, ready_fd))
    os.close(ready_fd)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        complain(f"{mountpoint}: the worker ended with {code}")
        with suppress(OSError):
            unmount(mountpoint, lazily=True)
        return 1
    return 0


def main() -> None:
    """Be the daemon."""
    mountpoint, fuse_fd, ready_fd, words = sys.argv[1:]
    code = 1
    try:
        code = serve(Path(mountpoint), parse_options([words]), int(fuse_fd), int(ready_fd))
    except (ZswapfsError, OSError) as error:
        with suppress(OSError):
            os.write(int(ready_fd), f"error: {error}\n".encode())
    sys.exit(code)


if __name__ == "__main__":
    main()
