"""The store in process: bytes in, bytes out. The only module that touches the binding."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from ._native import ffi, lib
from .config import CHUNK_BYTES, DEFAULT_RESERVE, PAGE_BYTES
from .errors import CorruptPageError, StoreError
from .stats import Stats

SLOT_STATES = ("empty", "same", "lz4", "raw")
_UNLIMITED = (1 << 64) - 1


def check(rv: int) -> int:
    """Return ``rv``, or raise what a negative one means."""
    if rv >= 0:
        return rv
    kind = CorruptPageError if rv == -errno.EIO else StoreError
    raise kind(-rv, os.strerror(-rv))


def region_memory() -> tuple[int, bool]:
    """Return a new descriptor for a region, and whether its pages can never be swapped out."""
    flags = ffi.new("uint32_t *")
    fd = check(lib.region_memory(flags))
    return fd, bool(flags[0] & lib.REGION_NOSWAP)


def _native_options(nr_pages: int, mem_limit: int | None, chunk_size: int, reserve: int) -> Any:
    if min(nr_pages, chunk_size, 1 if mem_limit is None else mem_limit) < 1 or reserve < 0:
        check(-errno.EINVAL)
    return ffi.new(
        "struct store_options *",
        {
            "nr_pages": nr_pages,
            "mem_limit": mem_limit or 0,
            "chunk_bytes": chunk_size,
            "reserve_bytes": reserve,
        },
    )


def format_region(
    fd: int,
    nr_pages: int,
    mem_limit: int | None = None,
    chunk_size: int = CHUNK_BYTES,
    *,
    reserve: int = DEFAULT_RESERVE,
) -> None:
    """Lay out an empty region, for ``Store.adopt``. Arguments and errors are Store's."""
    check(lib.region_format(fd, _native_options(nr_pages, mem_limit, chunk_size, reserve)))


def probe_region(fd: int) -> None:
    """Raise StoreError where this version cannot adopt a region: EINVAL, EPROTONOSUPPORT."""
    check(lib.region_probe(fd))


def lane_steps(fd: int) -> tuple[int, ...]:
    """Return how far each lane is that serves a region: odd while it has a request."""
    steps = ffi.new("uint64_t[]", lib.SWITCH_MAX_LANES)
    check(lib.region_steps(fd, steps))
    return tuple(steps)


class Store:
    """Compressed pages, by index.

    ``nr_pages`` pages of 4096 bytes, all empty at first. ``mem_limit`` caps what the arena
    occupies, in bytes, its reserve included; a write that would exceed it raises StoreError
    (ENOSPC) and changes nothing. ``chunk_size`` is a power of two from 4096 (classic xvmalloc)
    to 65536. ``reserve`` bytes are kept populated ahead of need.

    Any thread may call any method; none holds the interpreter's lock while it works. Raises
    StoreError (EINVAL, ENOMEM) where no such store can be made.
    """

    def __init__(
        self,
        nr_pages: int,
        mem_limit: int | None = None,
        chunk_size: int = CHUNK_BYTES,
        *,
        reserve: int = DEFAULT_RESERVE,
        fd: int | None = None,
    ) -> None:
        options = _native_options(nr_pages, mem_limit, chunk_size, reserve)
        out = ffi.new("struct store **")
        self._store: Any = ffi.NULL
        self._own_fd = region_memory()[0] if fd is None else None
        try:
            check(lib.store_create(out, self._own_fd if fd is None else fd, options))
        except StoreError:
            self.close()
            raise
        self._store = out[0]
        self.nr_pages = nr_pages

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """Open the store that a region holds, however its last user ended; rebuild it.

        ``fd`` stays the caller's. Raises StoreError (EINVAL: not a region, EPROTONOSUPPORT:
        another format).
        """
        out = ffi.new("struct store **")
        check(lib.store_adopt(out, fd))
        store = cls.__new__(cls)
        store._store = out[0]  # noqa: SLF001 its own
        store._own_fd = None  # noqa: SLF001
        store.nr_pages = store.stats().nr_pages
        return store

    def close(self) -> None:
        """Free everything. A second call does nothing."""
        lib.store_destroy(self._store)
        self._store = ffi.NULL
        if self._own_fd is not None:
            os.close(self._own_fd)
            self._own_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pointer(self) -> Any:
        """The native store. Raises ValueError when it is closed, as files do."""
        if not self._store:
            raise ValueError("the store is closed")
        return self._store

    def _range(self, index: int, count: int) -> None:
        if index < 0 or count < 1 or index + count > self.nr_pages:
            raise IndexError(f"pages {index} to {index + count - 1} of {self.nr_pages}")

    def write(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Replace whole pages from ``index`` on.

        Raises StoreError (ENOSPC) where the memory limit leaves no room: pages up to the one
        that did not fit are replaced, the others keep their content.
        """
        view = memoryview(data)
        count, rest = divmod(view.nbytes, PAGE_BYTES)
        if rest or not count:
            raise ValueError(f"{view.nbytes} bytes are not whole pages of {PAGE_BYTES}")
        self._range(index, count)
        pages = ffi.from_buffer("char[]", view)
        if check(lib.store_write(self.pointer, index, count, pages)) < count:
            check(-errno.ENOSPC)

    def read(self, index: int, count: int = 1) -> bytes:
        """Return ``count`` whole pages. Raises CorruptPageError where one is damaged."""
        self._range(index, count)
        out = bytearray(count * PAGE_BYTES)
        check(lib.store_read(self.pointer, index, count, ffi.from_buffer("char[]", out)))
        return bytes(out)

    def discard(self, index: int, count: int = 1) -> int:
        """Forget pages; they read as zeroes. Return how many held content."""
        self._range(index, count)
        return check(lib.store_discard(self.pointer, index, count))

    def pread(self, offset: int, length: int) -> bytes:
        """Return bytes of the file, fewer at its end."""
        out = bytearray(length)
        view = ffi.from_buffer("char[]", out)
        return bytes(out[: check(lib.store_pread(self.pointer, offset, length, view))])

    def pwrite(self, offset: int, data: bytes) -> int:
        """Write bytes anywhere in the file; return how many. Raises StoreError (EFBIG, ENOSPC)."""
        return check(
            lib.store_pwrite(self.pointer, offset, len(data), ffi.from_buffer("char[]", data))
        )

    def punch(self, offset: int, length: int) -> None:
        """Zero bytes anywhere; whole pages among them are discarded."""
        check(lib.store_punch(self.pointer, offset, length))

    def compact(self, max_bytes: int | None = None) -> int:
        """Pack what is left and give memory back; return how many bytes.

        Ends after the round that won ``max_bytes``; without it, when nothing more can be won.
        """
        return check(
            lib.store_compact(self.pointer, _UNLIMITED if max_bytes is None else max_bytes)
        )

    def watch(self, event_fd: int, freed_bytes: int) -> None:
        """Have 1 added to an eventfd, once, when this many more bytes of blocks were freed."""
        lib.store_watch(self.pointer, event_fd, freed_bytes)

    def unwatch(self) -> None:
        """Forget the last ``watch``."""
        lib.store_watch(self.pointer, -1, 0)

    def check(self) -> None:
        """Verify everything. Nobody else may use the store meanwhile.

        Raises StoreError (EUCLEAN) that says the first fault found.
        """
        message = ffi.new("char[160]")
        rv = lib.store_check(self.pointer, message)
        if rv:
            raise StoreError(-rv, ffi.string(message).decode())

    def rebuild(self) -> int:
        """Recreate all but the slot table from it; return the pages whose block is damaged."""
        return check(lib.store_rebuild(self.pointer))

    def stored(self, index: int) -> tuple[str, bytes]:
        """Return a page's state (``empty``, ``same``, ``lz4``, ``raw``) and its stored form."""
        self._range(index, 1)
        state = ffi.new("uint32_t *")
        out = bytearray(PAGE_BYTES)
        view = ffi.from_buffer("char[]", out)
        length = check(lib.store_stored(self.pointer, index, view, state))
        return SLOT_STATES[state[0]], bytes(out[:length])

    def stats(self, daemon_rss: int = 0, restarts: int = 0) -> Stats:
        """Return what is counted now."""
        raw = ffi.new("struct store_stats *")
        check(lib.store_get_stats(self.pointer, raw))
        counted = {
            name: getattr(raw[0], name)
            for name in Stats.__dataclass_fields__
            if name not in ("daemon_rss", "restarts")
        }
        return Stats(**counted, daemon_rss=daemon_rss, restarts=restarts)


@dataclass(frozen=True)
class SwitchOptions:
    """What the switch needs; the descriptors stay the caller's."""

    fuse_fd: int
    """/dev/fuse, mounted, O_NONBLOCK."""
    socket_fd: int
    """Our end of pyfuse3's pair."""
    end_fd: int
    """An eventfd: 1 is added when the kernel has unmounted."""
    latency_fd: int
    """/dev/cpu_dma_latency, open for writing, or -1: CPUs sleep as they like."""
    nr_lanes: int
    spin_us: int
    max_request_bytes: int
    swap_inode: int


class FuseSwitch:
    """The native threads between /dev/fuse and pyfuse3, from their start to the unmount."""

    def __init__(self, store: Store, options: SwitchOptions) -> None:
        out = ffi.new("struct fuse_switch **")
        native = ffi.new("struct switch_options *", asdict(options))
        check(lib.switch_start(out, store.pointer, native))
        self._switch = out[0]

    @property
    def ready(self) -> bool:
        """Whether pyfuse3 has answered INIT."""
        return bool(lib.switch_ready(self._switch))

    def join(self) -> None:
        """Wait for the unmount. Raises StoreError where something else ended the lanes."""
        check(lib.switch_join(self._switch))


@contextmanager
def watched(store: Store, event_fd: int) -> Iterator[None]:
    """Whatever happens inside, nobody writes to ``event_fd`` afterwards."""
    try:
        yield
    finally:
        store.unwatch()
        os.close(event_fd)
