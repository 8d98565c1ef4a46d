"""What the benchmarks share: pages, contenders that hold them, progress, a place for results.

A contender is anything that pages can be written to, read from and discarded from, and that says
how much memory it takes for how many compressed bytes.
"""

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from zswapfs.store import Store

PAGE = 4096
TOP = Path(__file__).resolve().parents[2]
RESULTS = TOP / "build" / "bench"
ZRAM = Path("/sys/block/zram0")
_BLKDISCARD = 0x1277
_PUNCH = 0x03  # PUNCH_HOLE | KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def load_corpus(mib: int = 12) -> list[bytes]:
    """Return real memory pages, ``mib`` MiB of each program that is here; made once."""
    folder = TOP / "build" / f"corpus-{mib}"
    if not folder.exists():
        maker = TOP / "contrib" / "corpus" / "make_corpus.py"
        subprocess.run([sys.executable, maker, folder, "--mib", str(mib)], check=True)
    pages = []
    for file in sorted(folder.glob("*.pages")):
        data = file.read_bytes()
        pages += [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
    return pages


class Contender(Protocol):
    """Something that holds pages."""

    name: str

    def write(self, index: int, page: bytes) -> None:
        """Replace a page."""

    def discard(self, index: int) -> None:
        """Forget a page."""

    def compact(self) -> None:
        """Give back what can be given back."""

    def usage(self) -> tuple[int, int]:
        """Return bytes of memory used, and bytes of compressed content."""


class InProcess:
    """The store, without a mount."""

    def __init__(self, nr_pages: int, chunk_size: int = 65536, name: str = "store") -> None:
        self.name = name
        self.store = Store(nr_pages, chunk_size=chunk_size)

    def write(self, index: int, page: bytes) -> None:
        """Replace a page."""
        self.store.write(index, page)

    def discard(self, index: int) -> None:
        """Forget a page."""
        self.store.discard(index)

    def compact(self) -> None:
        """Compact fully."""
        self.store.compact()

    def usage(self) -> tuple[int, int]:
        """Return what the region's arena occupies, and the sum of the stored lengths."""
        self.store.compact(0)
        stats = self.store.stats()
        return stats.mem_used_bytes, stats.compr_bytes


class Mount:
    """A real mount, with the compaction task running as it comes."""

    def __init__(self, folder: Path, nr_pages: int, options: str = "") -> None:
        self.name = "mount"
        self.folder = folder
        words = f"size={nr_pages * PAGE}" + (f",{options}" if options else "")
        binary = Path(sys.executable).with_name("zswapfs")
        subprocess.run(
            [binary, "mount", folder, "-o", words], check=True, stderr=subprocess.DEVNULL
        )
        self.fd = os.open(folder / "swap", os.O_RDWR)

    def write(self, index: int, page: bytes) -> None:
        """Replace a page."""
        os.pwrite(self.fd, page, index * PAGE)

    def discard(self, index: int) -> None:
        """Punch a hole."""
        if _libc.fallocate(self.fd, _PUNCH, index * PAGE, PAGE):
            raise OSError(ctypes.get_errno(), "fallocate")

    def compact(self) -> None:
        """Compact fully."""
        (self.folder / ".compact").write_text("1")

    def raw(self) -> dict[str, int]:
        """Return everything that is counted."""
        return dict(json.loads((self.folder / ".stats.json").read_text())["raw"])

    def usage(self) -> tuple[int, int]:
        """Return what ``.stats`` says."""
        raw = self.raw()
        return raw["mem_used_bytes"], raw["compr_bytes"]


class Zram:
    """The kernel's, on /dev/zram0 with lz4."""

    def __init__(self, nr_pages: int, name: str = "zram") -> None:
        self.name = name
        self._page = mmap.mmap(-1, PAGE)
        (ZRAM / "reset").write_text("1")
        (ZRAM / "comp_algorithm").write_text("lz4")
        (ZRAM / "disksize").write_text(str(nr_pages * PAGE))
        self.fd = os.open("/dev/zram0", os.O_RDWR | os.O_DIRECT)

    def write(self, index: int, page: bytes) -> None:
        """Replace a page."""
        self._page[:] = page
        os.pwrite(self.fd, self._page, index * PAGE)

    def discard(self, index: int) -> None:
        """Discard a page."""
        fcntl.ioctl(self.fd, _BLKDISCARD, _range(index))

    def compact(self) -> None:
        """Start zsmalloc's compaction by hand."""
        (ZRAM / "compact").write_text("1")

    def usage(self) -> tuple[int, int]:
        """Return mem_used_total and compr_data_size."""
        words = (ZRAM / "mm_stat").read_text().split()
        return int(words[2]), int(words[1])

    def close(self) -> None:
        """Reset the device."""
        os.close(self.fd)
        (ZRAM / "reset").write_text("1")


def _range(index: int) -> bytes:
    return (index * PAGE).to_bytes(8, "little") + PAGE.to_bytes(8, "little")


def has_zram() -> bool:
    """Say whether a zram device is here and nobody uses it."""
    try:
        return ZRAM.exists() and (ZRAM / "disksize").read_text().strip() == "0"
    except OSError:
        return False


@contextlib.contextmanager
def contenders(nr_pages: int, *, classic: bool = False) -> Iterator[list[Contender]]:
    """Make all that this machine has; say what is left out; take them down afterwards."""
    with contextlib.ExitStack() as stack:
        store = InProcess(nr_pages)
        stack.callback(store.store.close)
        made: list[Contender] = [store]
        if classic:
            old = InProcess(nr_pages, 4096, "classic")
            stack.callback(old.store.close)
            made.append(old)
        if os.geteuid() == 0 and Path("/dev/fuse").exists():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zswapfs-bench-")))
            mounted = Mount(folder, nr_pages)
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
            stack.callback(os.close, mounted.fd)
            made.append(mounted)
        else:
            print("mount: left out, needs root and FUSE", file=sys.stderr)
        if os.geteuid() == 0 and has_zram():
            zram = Zram(nr_pages)
            stack.callback(zram.close)
            made.append(zram)
        else:
            print("zram: left out, no free /dev/zram0", file=sys.stderr)
        yield made


def shuffled(nr: int, seed: int) -> list[int]:
    """Return 0 to nr-1 in a random order that ``seed`` names."""
    order = list(range(nr))
    random.Random(seed).shuffle(order)
    return order


_T = TypeVar("_T")


def rotated(items: Sequence[_T], by: int) -> list[_T]:
    """Return the items in an order of its own for each round, so that none is always first."""
    at = by % len(items)
    return [*items[at:], *items[:at]]


def bar(steps: Iterable[_T], label: str) -> Iterator[_T]:
    """Yield the steps; draw how many are done, and which is going on, on a terminal only."""
    todo = list(steps)
    if not sys.stderr.isatty():
        yield from todo
        return
    with click.progressbar(
        todo, label=label, file=sys.stderr, item_show_func=lambda step: str(step or "")
    ) as shown:
        yield from shown


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median with lowest and highest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def corpus_file(mib: int = 12) -> Path:
    """Return all pages of the corpus in one file."""
    file = TOP / "build" / f"corpus-{mib}" / "all"
    if not file.exists():
        file.write_bytes(b"".join(load_corpus(mib)))
    return file


def build_c(name: str) -> Path:
    """Build a benchmark in C, with the options of the package; return the program."""
    where = TOP / "build" / "bench-native"
    options = ["-DZSWAPFS_PYTHON=OFF", "-DZSWAPFS_BENCH=ON"]
    configure = ["cmake", "-S", TOP / "native", "-B", where, "-G", "Ninja", *options]
    for words in (configure, ["cmake", "--build", where, "--target", name]):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return where / "bench" / name


def plain_package() -> Path:
    """Build zswapfs with a store that only keeps bytes; return what PYTHONPATH must name."""
    where = TOP / "build" / "bench-plain"
    options = ["-DZSWAPFS_PLAIN_STORE=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    configure = ["cmake", "-S", TOP / "native", "-B", where, "-G", "Ninja", *options]
    for words in (configure, ["cmake", "--build", where, "--target", "_native"]):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    package = where / "package" / "zswapfs"
    package.mkdir(parents=True, exist_ok=True)
    for file in (*(TOP / "zswapfs").glob("*.py"), *where.glob("_native.*.so")):
        shutil.copy(file, package)
    return package.parent


def measure_in_c(*words: object) -> dict[str, Any]:
    """Run a benchmark in C; return the JSON that it prints."""
    done = subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def progress(text: str) -> None:
    """Show where the benchmark is, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def pyplot() -> Any | None:
    """Return matplotlib's, set up to draw files; None, and say so, where it is not installed."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 only where there is something to draw
    except ImportError:
        print("no picture: matplotlib is not installed (pip install '.[bench]')", file=sys.stderr)
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    return plt


def save(name: str | Path, values: object) -> Path:
    """Write results as JSON, to build/bench unless a path says where; return the file."""
    file = RESULTS / f"{name}.json" if isinstance(name, str) else name.with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")
    return file
