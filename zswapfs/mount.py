"""The mount, for those who make it, serve it and end it."""

import ctypes
import errno
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from .config import Options, run_file
from .errors import SetupError

FSTYPE = "fuse.zswapfs"
MAX_REQUEST_BYTES = 256 << 10
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""The daemon has its own answer to these. Blocked while nobody could give it, from before it is
started on."""

# -P: the current directory may hold a zswapfs that is not built.
_PROGRAM = ("-P", "-m", "zswapfs.supervisor")
_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mount:
    """What a supervisor holds, and hands on to the program that takes its place."""

    mountpoint: Path
    options: Options
    fuse_fd: int
    region_fd: int = -1
    worker: int = 0
    """Process id."""
    restarts: int = 0

    def command(self, ready_fd: int, python: str = sys.executable) -> list[str]:
        """Return what to run as the daemon; all descriptors must be open in it.

        ``ready_fd`` gets lines: ``note: ...``, then ``ready`` or ``error: ...``; -1: nobody does.
        ``python`` decides which installed version it is.
        """
        words = [str(self.mountpoint), str(self.fuse_fd), str(ready_fd), self.options.words()]
        if self.worker:
            words.append(f"{self.region_fd},{self.worker},{self.restarts}")
        return [python, *_PROGRAM, *words]


def proc_lines(path: str) -> list[list[bytes]]:
    """Return the words of a file that names paths, in which all but blank and tab may occur."""
    lines = Path(path).read_bytes().split(b"\n")
    return [re.split(rb"[ \t]+", line) for line in lines if line]


def unescape(word: bytes) -> str:
    """Undo the octal escapes of /proc."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), word))


def mount_source(mountpoint: Path) -> str | None:
    """Return the source of the zswapfs that is mounted there, on top, or None."""
    source = None
    for words in proc_lines("/proc/self/mounts"):
        if unescape(words[1]) == str(mountpoint):
            source = unescape(words[0]) if words[2] == FSTYPE.encode() else None
    return source


def mount_fuse(mountpoint: Path, source: str) -> int:
    """Mount an empty FUSE filesystem; return the descriptor that its requests come from.

    ``source`` is what /proc/mounts will name it. Raises SetupError.
    """
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SetupError(f"/dev/fuse: {error.strerror}; is the fuse module there?") from None
    words = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions"
    words += f",max_read={MAX_REQUEST_BYTES}"
    names = (os.fsencode(source), os.fsencode(mountpoint), FSTYPE.encode())
    if _libc.mount(*names, _MS_NOSUID | _MS_NODEV, words.encode()):
        reason = os.strerror(ctypes.get_errno())
        os.close(fd)
        raise SetupError(f"{mountpoint}: cannot mount: {reason}")
    return fd


def unmount(mountpoint: Path, *, lazily: bool = False) -> None:
    """Unmount the zswapfs there, and nothing else. Raises OSError (EBUSY: in use; EINVAL: none)."""
    number = errno.EINVAL
    if mount_source(mountpoint) is not None:
        if not _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH if lazily else 0):
            return
        number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), str(mountpoint))


def restart_fifo(mountpoint: Path) -> Path:
    """Return where a supervisor that is told to restart (SIGHUP) says what became of it."""
    return run_file(mountpoint, "restart")


def restart_python(mountpoint: Path) -> Path:
    """Return the file that names the interpreter, hence the version, to restart with."""
    return run_file(mountpoint, "python")
