"""The mount's names and attributes; no policy, and never the content of a page.

Reads and writes of ``swap`` are answered by the lanes and do not get here.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pyfuse3
import trio

from .config import PAGE_BYTES
from .stats import Stats
from .store import Store

_T = TypeVar("_T")
log = logging.getLogger("zswapfs")

SWAP_INODE = pyfuse3.ROOT_INODE + 1
ATTRIBUTES_LAST = 3600.0
"""Seconds. Attributes never change; asked for at each open and read they would cost more than
the page."""


@dataclass(frozen=True)
class _File:
    name: bytes
    inode: int
    mode: int


_FILES = (
    _File(b"swap", SWAP_INODE, 0o600),
    _File(b".stats", SWAP_INODE + 1, 0o444),
    _File(b".stats.json", SWAP_INODE + 2, 0o444),
    _File(b".metrics", SWAP_INODE + 3, 0o444),
    _File(b".compact", SWAP_INODE + 4, 0o200),
)
_INODE_BITS = 8
"""Of a handle; above them is a serial number."""
_BY_NAME = {file.name: file for file in _FILES}
_BY_INODE = {file.inode: file for file in _FILES}
_RENDER: dict[bytes, Callable[[Stats], str]] = {
    b".stats": Stats.rzstats,
    b".stats.json": Stats.json,
    b".metrics": Stats.prometheus,
}


async def _in_thread(call: Callable[[], _T]) -> _T:
    """Run what may take long, or fail, beside the loop; an error becomes the request's answer.

    Any other exception than FUSEError would end pyfuse3, and leave the request without an answer.
    """
    try:
        return await trio.to_thread.run_sync(call)
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
    except Exception as error:
        log.exception("a request failed")
        raise pyfuse3.FUSEError(errno.EIO) from error


class Filesystem(pyfuse3.Operations):
    """One directory of five files.

    ``take_stats`` is called, in a thread, at each open of a statistics file: what one handle
    reads is one moment. ``generation`` tells apart the handles of this worker and those that an
    earlier one gave out; what is read from such a one is made anew.
    """

    def __init__(self, store: Store, take_stats: Callable[[], Stats], generation: int = 0) -> None:
        super().__init__()
        self._store = store
        self._take_stats = take_stats
        self._texts: dict[int, bytes] = {}
        self._serial = generation << 32
        self._born_ns = time.time_ns()

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = ATTRIBUTES_LAST
        entry.st_uid = entry.st_gid = 0
        entry.st_blksize = PAGE_BYTES
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._born_ns
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o755
            entry.st_nlink = 2
            return entry
        file = _BY_INODE.get(inode)
        if file is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry.st_mode = stat.S_IFREG | file.mode
        entry.st_nlink = 1
        entry.st_size = self._store.nr_pages * PAGE_BYTES if inode == SWAP_INODE else 0
        entry.st_blocks = entry.st_size // 512
        return entry

    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Return attributes."""
        del ctx
        return self._attributes(inode)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of a name; there is one directory."""
        del ctx
        if parent_inode == pyfuse3.ROOT_INODE:
            if name in (b".", b".."):
                return self._attributes(pyfuse3.ROOT_INODE)
            if name in _BY_NAME:
                return self._attributes(_BY_NAME[name].inode)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open the one directory."""
        del ctx
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List the files from the ``start_id``-th on."""
        del fh
        for number, file in enumerate(_FILES[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, file.name, self._attributes(file.inode), number):
                return

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file; nothing of it is cached by the kernel."""
        del ctx
        file = _BY_INODE.get(inode)
        if file is None:
            raise pyfuse3.FUSEError(errno.EISDIR)
        if flags & os.O_TRUNC and inode == SWAP_INODE:
            raise pyfuse3.FUSEError(errno.EPERM)
        allowed = {0o600: range(3), 0o444: (os.O_RDONLY,), 0o200: (os.O_WRONLY,)}[file.mode]
        if flags & os.O_ACCMODE not in allowed:  # which the kernel does not ask of root
            raise pyfuse3.FUSEError(errno.EACCES)
        handle = inode
        if file.name in _RENDER:
            self._serial += 1
            handle = self._serial << _INODE_BITS | inode
            self._texts[handle] = await self._render(file.name)
        return pyfuse3.FileInfo(fh=handle, direct_io=True)

    async def _render(self, name: bytes) -> bytes:
        render = _RENDER[name]
        return await _in_thread(lambda: render(self._take_stats()).encode())

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read from the text made at open."""
        file = _BY_INODE.get(fh & ((1 << _INODE_BITS) - 1))
        if file is None or file.name not in _RENDER:
            raise pyfuse3.FUSEError(errno.EBADF)
        if fh not in self._texts:
            self._texts[fh] = await self._render(file.name)
        return self._texts[fh][off : off + size]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Compact fully, whatever is written to ``.compact``."""
        del off
        if fh != _BY_NAME[b".compact"].inode:
            raise pyfuse3.FUSEError(errno.EBADF)
        await _in_thread(self._store.compact)
        return len(buf)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Refuse what would change the file's size, mode or owner; times are of no interest."""
        del fh, ctx
        now = self._attributes(inode)
        if fields.update_size and inode == SWAP_INODE and attr.st_size != now.st_size:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        return now

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Report 4 KiB blocks: the loop device takes its discard granularity from f_bsize."""
        del ctx
        stats = await _in_thread(self._store.stats)
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = PAGE_BYTES
        data.f_blocks = stats.nr_pages
        data.f_bfree = data.f_bavail = stats.nr_pages - stats.pages_stored - stats.same_pages
        data.f_files = len(_FILES)
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    async def release(self, fh: int) -> None:
        """Forget a handle's text."""
        self._texts.pop(fh, None)

    async def releasedir(self, fh: int) -> None:
        """Nothing was kept."""

    async def flush(self, fh: int) -> None:
        """Nothing is cached."""

    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 pyfuse3's signature
        """Nothing is cached."""
