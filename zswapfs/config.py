"""Options: what they are called, what they mean, and which values make sense.

Sizes are binary: ``8G`` is 8 x 2^30 bytes; ``50%`` is half of the machine's memory.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from .errors import ConfigError

PAGE_BYTES = 4096
MAX_SIZE = 1 << 40
"""Bytes of content that slots can address (STORE_MAX_PAGES in native/zswapfs.h)."""
CHUNK_BYTES = 65536
DEFAULT_MOUNTPOINT = Path("/run/zswapfs")
RUN_FOLDER = Path("/run/zswapfs.d")
"""What is to be known about mounts until the next boot; root's alone."""
DEFAULT_RESERVE = 4 << 20

_ALL = 100  # percent
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(
    r"(?P<number>\d{1,18}(\.\d{1,18})?)((?P<unit>[KMGT]?)(i?B)?|(?P<percent>%))", re.IGNORECASE
)

IGNORED_MOUNT_OPTIONS = frozenset(
    "defaults auto noauto nofail user nouser users owner group rw dev nodev suid nosuid exec "
    "noexec async sync _netdev relatime noatime nodiratime norelatime strictatime".split()
)
"""Words of fstab that mean nothing here, or what is so anyway."""


def run_file(mountpoint: Path, kind: str) -> Path:
    """Return the path of a file about one mount."""
    RUN_FOLDER.mkdir(mode=0o700, exist_ok=True)
    return RUN_FOLDER / f"{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]}.{kind}"


def ram_bytes() -> int:
    """Return the machine's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parse_size(text: str, what: str) -> int:
    """Return the bytes that ``text`` names, a multiple of a page.

    ``what`` is the option's name, for the message. Raises ConfigError for what is not a size,
    and for zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{what}: '{text}' is not a size (like 8G, 512M or 50%)")
    number = float(match["number"])
    if match["percent"]:
        value = number / 100 * ram_bytes()
    else:
        value = number * _UNITS[match["unit"].upper()]
    pages = int(value) // PAGE_BYTES
    if pages == 0:
        raise ConfigError(f"{what}: '{text}' is less than one page of {PAGE_BYTES} bytes")
    return pages * PAGE_BYTES


def parse_count(text: str, what: str, least: int, most: int) -> int:
    """Return a whole number between two bounds. Raises ConfigError otherwise."""
    if not re.fullmatch(r"\d{1,9}", text) or not least <= int(text) <= most:
        raise ConfigError(f"{what}: '{text}' is not a number from {least} to {most}")
    return int(text)


def parse_percent(text: str, what: str) -> float:
    """Return a percentage above 0 and up to 100. Raises ConfigError otherwise."""
    number = text.rstrip("%")
    if not re.fullmatch(r"\d{1,3}(\.\d{1,3})?", number) or not 0 < float(number) <= _ALL:
        raise ConfigError(f"{what}: '{text}' is not a percentage above 0 and up to 100")
    return float(number)


@dataclass(frozen=True)
class Options:
    """What one mount is made with. Validated; every field can be given as ``-o name=value``."""

    size: int = 0
    """Bytes of swap; 0 asks for the default, half of the memory."""
    mem_limit: int | None = None
    """Bytes; hard cap on what the arena occupies, reserve included. None: no cap."""
    reserve: int = DEFAULT_RESERVE
    """Bytes of chunks that are kept populated ahead of need."""
    lanes: int = 2
    """Threads that serve page requests, 1 to 64."""
    spin_us: int = 30
    """Microseconds that a lane goes on looking for requests after a read, 0 to 1000."""
    awake: int = 1
    """1: while requests follow each other closely, CPUs are kept from sleep states."""
    heartbeat: int = 10
    """Seconds without a sign of life after which a worker is replaced; 0: never."""
    strict: int = 0
    """1: without each protection there is no mount. 0: what is missing is said, and it goes on."""
    compact_at: float = 0.5
    """Percent of the arena's memory that must be free inside chunks for compaction to begin."""
    compact_fast: float = 5.0
    """Percent from which on compaction does not pause between its rounds."""

    def __post_init__(self) -> None:
        """Fill in the default size and check what depends on more than one field."""
        if self.size == 0:
            object.__setattr__(self, "size", parse_size("50%", "size"))
        if self.size > MAX_SIZE:
            raise ConfigError(
                f"size: {self.size} bytes is more than slots can address ({MAX_SIZE >> 40}T)"
            )
        if self.reserve > ram_bytes() // 4:
            raise ConfigError(
                f"reserve: {self.reserve} bytes is more than a quarter of the machine's memory "
                f"({ram_bytes()} bytes)"
            )
        if self.mem_limit is not None and self.mem_limit < self.reserve + CHUNK_BYTES:
            raise ConfigError(
                f"mem-limit: {self.mem_limit} bytes leaves nothing beside the reserve "
                f"({self.reserve} bytes)"
            )
        if self.mem_limit is not None and self.mem_limit > ram_bytes():
            raise ConfigError(
                f"mem-limit: {self.mem_limit} bytes is more than the machine's memory "
                f"({ram_bytes()} bytes)"
            )
        if self.compact_fast < self.compact_at:
            raise ConfigError("compact_fast: must not be below compact_at")

    @property
    def nr_pages(self) -> int:
        """Pages of the swap file."""
        return self.size // PAGE_BYTES

    def words(self) -> str:
        """Return what ``parse_options`` makes the same options of."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)


_PARSERS: dict[str, Callable[[str], int | float]] = {
    "size": lambda text: parse_size(text, "size"),
    "mem_limit": lambda text: parse_size(text, "mem-limit"),
    "reserve": lambda text: parse_size(text, "reserve"),
    "lanes": lambda text: parse_count(text, "lanes", 1, 64),
    "spin_us": lambda text: parse_count(text, "spin_us", 0, 1000),
    "awake": lambda text: parse_count(text, "awake", 0, 1),
    "heartbeat": lambda text: parse_count(text, "heartbeat", 0, 3600),
    "strict": lambda text: parse_count(text, "strict", 0, 1),
    "compact_at": lambda text: parse_percent(text, "compact_at"),
    "compact_fast": lambda text: parse_percent(text, "compact_fast"),
}


def parse_options(words: list[str]) -> Options:
    """Return the options that ``-o`` words (each ``a,b=c``) name; the last one of a name counts.

    Raises ConfigError for unknown names, missing values and values that make no sense.
    """
    values: dict[str, int | float] = {}
    for word in ",".join(words).split(","):
        name, _, value = word.partition("=")
        name = name.replace("-", "_")
        if not name or name in IGNORED_MOUNT_OPTIONS or name.startswith(("x_", "comment")):
            continue
        parser = _PARSERS.get(name)
        if parser is None:
            known = ", ".join(field.name for field in fields(Options))
            raise ConfigError(f"unknown option '{name}' (there are {known})")
        if not value:
            raise ConfigError(f"{name}: needs a value")
        values[name] = parser(value)
    return Options(**values)  # type: ignore[arg-type]
