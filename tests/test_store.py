"""The store against a dict of bytes, with another LZ4 decoder as the judge of what is stored."""

import errno
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import lz4.block
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zswapfs.errors import CorruptPageError, StoreError
from zswapfs.store import Store, region_memory

PAGE = 4096
PAGES = 40
ZEROES = bytes(PAGE)
CHUNK_SIZES = [4096, 16384, 65536]

indices = st.integers(0, PAGES - 1)
words = st.one_of(st.just(bytes(8)), st.binary(min_size=8, max_size=8))


@st.composite
def pages(draw: st.DrawFn) -> bytes:
    """Draw a page: same-filled, compressible to any degree, or not at all."""
    kind = draw(st.sampled_from(["same", "text", "noise", "border"]))
    if kind == "same":
        return draw(words) * (PAGE // 8)
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    noise = {
        "text": chance.randrange(1, 2500),
        "noise": PAGE,
        "border": chance.randrange(3000, 3100),
    }
    return (chance.randbytes(noise[kind]) + bytes(PAGE))[:PAGE]


class StoreMachine(RuleBasedStateMachine):
    """Writes, partial writes, reads, holes, a memory limit, compaction and rebuilding."""

    chunk_size = 65536
    mem_limit: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.model = bytearray(PAGES * PAGE)
        self.store = Store(PAGES, self.mem_limit, self.chunk_size, reserve=4 * self.chunk_size)
        self.noise = random.Random(1).randbytes(PAGES * PAGE)

    @contextmanager
    def may_be_full(self) -> Iterator[list[StoreError]]:
        """Where there is a limit, ENOSPC is an answer; it is put into the list."""
        full: list[StoreError] = []
        try:
            yield full
        except StoreError as error:
            if self.mem_limit is None or error.errno != errno.ENOSPC:
                raise
            full.append(error)

    @rule(index=indices, content=st.lists(pages(), min_size=1, max_size=6))
    def write(self, index: int, content: list[bytes]) -> None:
        """Whole pages; at the limit a part of them, in order."""
        content = content[: PAGES - index]
        data = b"".join(content)
        at = index * PAGE
        with self.may_be_full() as full:
            self.store.write(index, data)
        if full:
            now = self.store.read(index, len(content))
            stored = 0
            while now[stored * PAGE :][:PAGE] == content[stored]:
                stored += 1
            data = data[: stored * PAGE]
        self.model[at : at + len(data)] = data

    @rule(at=st.integers(0, PAGES * PAGE - 1), length=st.integers(1, 3 * PAGE))
    def write_bytes(self, at: int, length: int) -> None:
        """Any offset and length."""
        data = self.noise[at : at + length]
        done = 0
        with self.may_be_full():
            done = self.store.pwrite(at, data)
        self.model[at : at + done] = data[:done]

    @rule(at=st.integers(0, PAGES * PAGE), length=st.integers(0, 5 * PAGE))
    def read_bytes(self, at: int, length: int) -> None:
        """Any offset and length."""
        assert self.store.pread(at, length) == self.model[at : at + length]

    @rule(index=indices, count=st.integers(1, PAGES))
    def discard(self, index: int, count: int) -> None:
        """NotifyFree rises by what is held less."""
        count = min(count, PAGES - index)
        before = self.store.stats()
        freed = self.store.discard(index, count)
        after = self.store.stats()
        held = before.pages_stored + before.same_pages - after.pages_stored - after.same_pages
        assert freed == held == after.notify_free - before.notify_free
        assert after.discards - before.discards == count
        self.model[index * PAGE : (index + count) * PAGE] = bytes(count * PAGE)

    @precondition(lambda self: self.mem_limit is None)
    @rule(at=st.integers(0, PAGES * PAGE - 1), length=st.integers(1, 3 * PAGE))
    def punch(self, at: int, length: int) -> None:
        """Bytes become zeroes."""
        self.store.punch(at, length)
        end = min(at + length, PAGES * PAGE)
        self.model[at:end] = bytes(end - at)

    @rule()
    def compact(self) -> None:
        """Never takes more than it gives."""
        before = self.store.stats().nr_chunks
        self.store.compact()
        assert self.store.stats().nr_chunks <= before

    @rule()
    def rebuild(self) -> None:
        """Make the same store from the slot table alone."""
        before = self.store.stats()
        assert self.store.rebuild() == 0
        after = self.store.stats()
        for name in ("pages_stored", "same_pages", "compr_bytes", "good_pages", "raw_pages",
                     "reads", "writes", "notify_free"):  # fmt: skip
            assert getattr(after, name) == getattr(before, name)

    @rule(index=indices)
    def stored_form(self, index: int) -> None:
        """Another decoder makes the same page of it."""
        state, stored = self.store.stored(index)
        page = bytes(self.model[index * PAGE : (index + 1) * PAGE])
        match state:
            case "empty":
                assert page == ZEROES
            case "same":
                assert stored * (PAGE // 8) == page
            case "lz4":
                assert len(stored) <= 3072
                assert lz4.block.decompress(stored, uncompressed_size=PAGE) == page
            case "raw":
                assert stored == page

    @invariant()
    def everything_holds(self) -> None:
        """check() finds nothing, all content is right, the limit is kept."""
        self.store.check()
        assert self.store.read(0, PAGES) == self.model
        stats = self.store.stats()
        assert stats.failed_reads == 0
        if self.mem_limit is not None:
            assert stats.mem_used_bytes + stats.reserve_bytes <= self.mem_limit

    def teardown(self) -> None:
        """Free it."""
        self.store.close()


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_store_is_a_dict_of_bytes(chunk_size: int, *, limited: bool) -> None:
    """For any history, at each chunk size, with and without a memory limit."""

    class Machine(StoreMachine):
        pass

    Machine.chunk_size = chunk_size
    Machine.mem_limit = max(12 * 4096, 2 * chunk_size) if limited else None
    case = Machine.TestCase()
    case.settings = settings(
        max_examples=120,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    case.runTest()


def test_what_makes_no_sense_is_refused() -> None:
    """Indices, lengths, options: an exception, and nothing changed."""
    with Store(10) as store:
        for index, data in ((-1, ZEROES), (10, ZEROES), (9, 2 * ZEROES)):
            with pytest.raises(IndexError):
                store.write(index, data)
        for data in (b"", b"x", ZEROES + b"x"):
            with pytest.raises(ValueError, match="whole pages"):
                store.write(0, data)
        for index, count in ((-1, 1), (10, 1), (0, 11), (0, 0)):
            with pytest.raises(IndexError):
                store.read(index, count)
            with pytest.raises(IndexError):
                store.discard(index, count)
        assert store.stats().writes == 0
    for bad in (
        {"nr_pages": 0},
        {"nr_pages": 1 << 40},
        {"nr_pages": 1, "chunk_size": 1000},
        {"nr_pages": -1},
        {"nr_pages": 1, "mem_limit": 0},
        {"nr_pages": 1, "reserve": -1},
    ):
        with pytest.raises(StoreError, match="Invalid argument"):
            Store(**bad)


def test_a_closed_store_can_be_closed_again() -> None:
    """As files can."""
    store = Store(10)
    store.close()
    store.close()


def test_a_closed_store_refuses_everything() -> None:
    """As files do."""
    store = Store(10)
    store.close()
    for use in (
        lambda: store.write(0, ZEROES),
        lambda: store.read(0),
        lambda: store.discard(0),
        lambda: store.pread(0, 1),
        lambda: store.pwrite(0, b"x"),
        lambda: store.punch(0, 1),
        lambda: store.stored(0),
        store.compact,
        store.check,
        store.rebuild,
        store.stats,
    ):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_region_is_adopted_by_the_next_store(corpus: list[bytes]) -> None:
    """With all pages, whoever opened it first; what is no region is refused."""
    fd, _ = region_memory()
    try:
        with Store(100, fd=fd) as store:
            store.write(3, b"".join(corpus[:50]))
        with Store.adopt(fd) as store:
            assert store.nr_pages == 100
            assert store.read(3, 50) == b"".join(corpus[:50])
            assert store.read(0, 3) == 3 * ZEROES
            store.check()
    finally:
        os.close(fd)
    fd, _ = region_memory()
    with pytest.raises(StoreError, match="Invalid argument"):
        Store.adopt(fd)
    os.close(fd)


def test_a_full_store_says_so_and_recovers(corpus: list[bytes]) -> None:
    """ENOSPC is a StoreError; what was there stays; discards make room."""
    with Store(4000, 5 << 20) as store:
        pages = [corpus[index % len(corpus)] for index in range(4000)]
        with pytest.raises(StoreError, match="No space") as caught:
            store.write(0, b"".join(pages))
        held = store.stats().pages_stored + store.stats().same_pages
        assert caught.value.errno == errno.ENOSPC
        assert not isinstance(caught.value, CorruptPageError)
        for index in range(held):
            assert store.read(index) == corpus[index % len(corpus)]
        assert store.read(held) == ZEROES
        store.discard(0, 500)
        store.write(held, corpus[held % len(corpus)])
        store.check()


def test_threads_share_one_store(corpus: list[bytes]) -> None:
    """More threads than the store has desks, each on pages of its own, and one that compacts."""
    wrong = []
    done = threading.Event()
    with Store(4000, chunk_size=16384) as store:

        def work(first: int) -> None:
            for turn in range(150):
                index = first + turn * 7 % 150
                page = corpus[(first * 31 + turn) % len(corpus)]
                store.write(index, page)
                if store.read(index) != page:
                    wrong.append(index)
                if turn % 3 == 0:
                    store.discard(index)

        def compact() -> None:
            while not done.is_set():
                store.compact()

        threads = [threading.Thread(target=work, args=(n * 200,)) for n in range(20)]
        packer = threading.Thread(target=compact)
        for thread in [packer, *threads]:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        packer.join()
        store.check()
    assert not wrong
