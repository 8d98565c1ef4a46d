"""Sizes and options: what is understood, and what is refused with which words."""

import pytest

from zswapfs.config import (
    CHUNK_BYTES,
    DEFAULT_RESERVE,
    MAX_SIZE,
    Options,
    parse_options,
    parse_size,
    ram_bytes,
)
from zswapfs.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("4K", 4096),
        ("8G", 8 << 30),
        ("8g", 8 << 30),
        ("1.5M", 3 << 19),
        ("512MiB", 512 << 20),
        ("2TB", 2 << 40),
        ("5000", 4096),
    ],
)
def test_sizes_are_binary_whole_pages(text: str, value: int) -> None:
    """A size is bytes or has a binary unit, and is rounded down to pages."""
    assert parse_size(text, "size") == value


def test_percent_is_of_memory() -> None:
    """A percentage is of the machine's memory."""
    assert parse_size("50%", "size") == ram_bytes() // 2 // 4096 * 4096


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "-1G",
        "8X",
        "1e9",
        "0x10",
        "8 G G",
        "%",
        "nan",
        "inf",
        pytest.param(400 * "9", id="digits"),
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """The message names the option and the word."""
    with pytest.raises(ConfigError, match=r"size: .* is not a size"):
        parse_size(text, "size")


@pytest.mark.parametrize("text", ["0", "0G", "4095", "0%"])
def test_less_than_a_page_is_refused(text: str) -> None:
    """An empty file is no swap."""
    with pytest.raises(ConfigError, match="less than one page"):
        parse_size(text, "size")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("size=2T", "more than slots can address"),
        ("mem_limit=4M", "leaves nothing beside the reserve"),
        ("mem_limit=100T", "more than the machine's memory"),
        ("lanes=0", "lanes: '0' is not a number from 1 to 64"),
        ("lanes=65", "lanes"),
        ("spin_us=-1", "spin_us"),
        ("reserve=90%", "more than a quarter"),
        ("compact_at=0", "compact_at"),
        ("compact_at=101", "compact_at"),
        ("compact_at=20,compact_fast=10", "compact_fast"),
        ("compact_at=x", "compact_at"),
        ("size", "size: needs a value"),
        ("sise=1G", "unknown option 'sise'"),
    ],
)
def test_bad_options_are_refused(words: str, message: str) -> None:
    """Each with a line that says which and why."""
    with pytest.raises(ConfigError, match=message):
        parse_options([words])


def test_the_words_of_fstab_mean_nothing() -> None:
    """Generic mount options are accepted and ignored."""
    words = "defaults,noauto,nofail,rw,_netdev,x-systemd.requires=a,comment=b,size=1G,"
    assert parse_options([words]) == Options(size=1 << 30)


def test_defaults_are_half_of_memory_and_no_limit() -> None:
    """As the README says."""
    options = parse_options([])
    assert options.size == ram_bytes() // 2 // 4096 * 4096
    assert options.mem_limit is None
    assert options.reserve == DEFAULT_RESERVE


def test_the_last_word_counts_and_dashes_do_not_matter() -> None:
    """As everywhere in mount options."""
    limit = DEFAULT_RESERVE + CHUNK_BYTES
    assert parse_options(["size=1G,size=2G", f"mem-limit={limit}"]) == Options(2 << 30, limit)


def test_options_as_words_are_the_same_options() -> None:
    """What the daemon is started with."""
    for words in ("size=1G", "size=3M,mem_limit=9M,reserve=2M,lanes=7,spin_us=0,compact_at=0.125"):
        options = parse_options([words])
        assert parse_options([options.words()]) == options


def test_the_largest_size_is_accepted() -> None:
    """What slots can address is not off by one."""
    assert Options(size=MAX_SIZE).nr_pages == MAX_SIZE // 4096
