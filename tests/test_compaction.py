"""The compaction task and `.compact`: by itself, on demand, in bad moments."""

import ctypes
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mounted, run, zswapfs

from zswapfs.compaction import free_percent, is_urgent
from zswapfs.config import Options
from zswapfs.store import Store

PAGE = 4096


def _hole(fd: int, index: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    assert libc.fallocate(fd, 3, index * PAGE, PAGE) == 0


def _fill_and_free(mounted: Mounted, corpus: list[bytes], nr: int, keep: int) -> None:
    fd = os.open(mounted.file, os.O_RDWR)
    for index in range(nr):
        os.pwrite(fd, corpus[index % len(corpus)], index * PAGE)
    for index in range(nr):
        if index % keep:
            _hole(fd, index)
    os.close(fd)


def _cpu_ticks(mounted: Mounted) -> int:
    total = 0
    for process in mounted.daemon():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total


@pytest.mark.mounted
def test_freed_memory_comes_back_by_itself(mounted: Mounted, corpus: list[bytes]) -> None:
    """Within 5 s at 1.05 or better; then no CPU time, and the pages are as they were."""
    _fill_and_free(mounted, corpus, 12000, 3)
    time.sleep(5)
    raw = mounted.raw()
    assert raw["mem_used_bytes"] <= 1.05 * raw["compr_bytes"]
    assert raw["pages_compacted"] > 0
    assert raw["pages_returned"] > 0
    before = _cpu_ticks(mounted)
    time.sleep(3)
    assert _cpu_ticks(mounted) - before <= 1
    data = mounted.file.read_bytes()
    for index in range(0, 12000, 3):
        assert data[index * PAGE : (index + 1) * PAGE] == corpus[index % len(corpus)]


@pytest.mark.mounted
def test_a_threshold_of_100_percent_leaves_it_to_you(
    mount: Callable[..., Mounted], corpus: list[bytes]
) -> None:
    """Nothing moves until `.compact` is written to."""
    mounted = mount(compact_at=100, compact_fast=100)
    _fill_and_free(mounted, corpus, 4000, 3)
    time.sleep(1)
    assert mounted.raw()["pages_compacted"] == 0
    done = zswapfs("compact", mounted.path)
    assert done.returncode == 0
    assert mounted.raw()["pages_compacted"] > 0
    assert float(done.stdout.split()[2]) > 0.5


@pytest.mark.mounted
def test_compact_in_bad_moments(mounted: Mounted, corpus: list[bytes]) -> None:
    """Of an empty store, twice at once, during heavy writes: it ends, and content stays."""
    assert zswapfs("compact", mounted.path).stdout.startswith("zswapfs: returned 0.0 MiB, moved 0")
    stop = threading.Event()
    wrong = []

    def write(first: int) -> None:
        chance = random.Random(first)
        fd = os.open(mounted.file, os.O_RDWR)
        held: dict[int, bytes] = {}
        while not stop.is_set():
            index = first + chance.randrange(2000)
            if chance.random() < 0.4:
                _hole(fd, index)
                held[index] = bytes(PAGE)
            else:
                held[index] = chance.choice(corpus)
                os.pwrite(fd, held[index], index * PAGE)
        wrong.extend(i for i, page in held.items() if os.pread(fd, PAGE, i * PAGE) != page)
        os.close(fd)

    def compact() -> None:
        while not stop.is_set():
            (mounted.path / ".compact").write_text("1")

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 5000)]
    threads += [threading.Thread(target=compact) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not wrong
    assert mounted.raw()["failed_reads"] == 0


@pytest.mark.mounted
def test_unmount_while_compacting(mounted: Mounted, corpus: list[bytes]) -> None:
    """Umount waits for who writes to `.compact`; the daemon ends."""
    _fill_and_free(mounted, corpus, 12000, 3)
    thread = threading.Thread(target=(mounted.path / ".compact").write_text, args=("1",))
    thread.start()
    for _ in range(200):
        if run("umount", mounted.path).returncode == 0:
            break
        time.sleep(0.02)
    thread.join(10)
    for _ in range(200):
        if not mounted.daemon():
            return
        time.sleep(0.02)
    pytest.fail("the daemon outlived its mount")


@pytest.mark.parametrize("chunk_size", [4096, 65536])
@pytest.mark.parametrize("kind", ["raw", "same", "mixed", "one chunk", "full"])
def test_corner_cases_in_process(corpus: list[bytes], chunk_size: int, kind: str) -> None:
    """All raw, all same-filled, one chunk, the memory limit reached: sound, and nothing lost."""
    chance = random.Random(kind)
    nr = {"one chunk": 5, "full": 3000}.get(kind, 1500)
    limit = (4 << 20) if kind == "full" else None
    held: dict[int, bytes] = {}
    with Store(nr, limit, chunk_size, reserve=1 << 20) as store:
        for index in range(nr):
            if kind == "same":
                page = chance.randbytes(8) * 512
            elif kind == "raw" or (kind == "mixed" and index % 2):
                page = chance.randbytes(PAGE)
            else:
                page = corpus[index % len(corpus)]
            try:
                store.write(index, page)
            except OSError:
                break
            held[index] = page
        assert kind != "full" or len(held) < nr
        for share in (0.0, 0.5, 0.9):
            for index in [i for i in held if chance.random() < share]:
                store.discard(index)
                del held[index]
            store.compact()
            store.check()
            stats = store.stats()
            assert limit is None or stats.mem_used_bytes + stats.reserve_bytes <= limit
            for index, page in held.items():
                assert store.read(index) == page


def test_whole_os_pages_of_the_last_chunk_go_back(corpus: list[bytes]) -> None:
    """What no round can win is less than a chunk; most of that goes back too, again and again."""
    with Store(4000) as store:
        for turn in range(3):
            for index in range(2000):
                store.write(index, corpus[(index + turn) % len(corpus)])
            for index in range(5 + turn, 2000):
                store.discard(index)
            store.compact()
            store.check()
            stats = store.stats()
            assert stats.mem_used_bytes % 65536 != 0
            assert stats.mem_used_bytes < stats.nr_chunks * 65536
            assert stats.mem_used_bytes - stats.compr_bytes < 12 << 10
            for index in range(5 + turn):
                assert store.read(index) == corpus[(index + turn) % len(corpus)]
            store.rebuild()
            store.check()
        store.discard(0, 4000)
        store.compact()
        store.check()
        assert store.stats().mem_used_bytes == 0


def test_the_gears(corpus: list[bytes]) -> None:
    """Fast where much can be won, or the limit is near; gently otherwise."""
    options = Options(size=1 << 30)
    with Store(4000) as store:
        for index in range(4000):
            store.write(index, corpus[index % len(corpus)])
        assert free_percent(store.stats()) < options.compact_fast
        assert not is_urgent(store.stats(), options)
        for index in range(0, 4000, 2):
            store.discard(index)
        assert free_percent(store.stats()) > options.compact_fast
        assert is_urgent(store.stats(), options)
        store.compact()
        assert not is_urgent(store.stats(), options)
    with Store(4000, 6 << 20) as store:
        assert not is_urgent(store.stats(), options)
        for index in range(4000):
            try:
                store.write(index, corpus[index % len(corpus)])
            except OSError:
                break
        assert is_urgent(store.stats(), options)


def test_a_watch_is_told_once_and_at_the_limit(corpus: list[bytes]) -> None:
    """After so many freed bytes, or when a write was refused; never without a reason."""
    event = os.eventfd(0, os.EFD_NONBLOCK)
    with Store(4000, 6 << 20) as store:
        store.watch(event, 100_000)
        for index in range(100):
            store.write(index, corpus[index])
        with pytest.raises(BlockingIOError):
            os.eventfd_read(event)
        store.discard(0, 100)
        store.write(0, corpus[0])
        store.discard(0)
        assert os.eventfd_read(event) == 1
        store.watch(event, 1 << 30)
        chance = random.Random(1)
        noise = chance.randbytes(4000 * PAGE)
        with pytest.raises(OSError, match="No space"):
            store.write(0, noise)
        assert os.eventfd_read(event) == 1
        store.watch(event, 0)
        store.unwatch()
        os.close(event)
