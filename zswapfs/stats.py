"""Statistics: counted by the store, written as rzstats, JSON or Prometheus text."""

import json
from dataclasses import asdict, dataclass

PAGE_KIB = 4


@dataclass(frozen=True)
class Stats:
    """One look at a store. Pages are of 4 KiB; bytes where a name says so."""

    nr_pages: int
    """Pages of the swap file."""
    mem_limit: int
    """Bytes; cap on what the arena occupies, 0 without one."""
    reads: int
    """Pages read by valid requests, failed ones included."""
    writes: int
    """Pages written by valid requests, failed ones included."""
    failed_reads: int
    """Pages whose content did not decompress or match its checksum."""
    failed_writes: int
    """Pages that could not be stored."""
    invalid_io: int
    """Requests out of range, or malformed."""
    notify_free: int
    """Discarded pages that held content, stored or same-filled."""
    discards: int
    """Pages named by discards, whether they held content or not."""
    same_pages: int
    """Pages held now as one repeated word, without a block."""
    pages_stored: int
    """Pages held in the arena now."""
    good_pages: int
    """Of these, how many are at most half a page long."""
    raw_pages: int
    """Of these, how many are kept uncompressed."""
    compr_bytes: int
    """Sum of the stored lengths, without headers."""
    mem_used_bytes: int
    """What the arena occupies, from the OS's own count of the region; the reserve not included."""
    mem_max_bytes: int
    """The highest sum of chunks in use so far."""
    reserve_bytes: int
    """Populated chunks that are held ready."""
    table_bytes: int
    """Resident header, slot table, word table and chunk table."""
    pages_compacted: int
    """Blocks that compaction moved."""
    pages_returned: int
    """Pages given back to the OS."""
    free_bytes: int
    """Free bytes inside chunks in use."""
    nr_chunks: int
    """Chunks in use."""
    daemon_rss: int = 0
    """Bytes of resident memory of the daemon's processes, the region not included."""
    restarts: int = 0
    """Recoveries of the worker."""

    @property
    def fragmentation(self) -> float:
        """Memory that the arena occupies for each byte stored; 0 when it is empty."""
        return self.mem_used_bytes / self.compr_bytes if self.compr_bytes else 0.0

    def _percent(self, part: int) -> int:
        return round(100 * part / self.pages_stored) if self.pages_stored else 0

    def fields(self) -> list[tuple[str, int | float, str]]:
        """Return (name, value, unit) of every field of ``.stats``, in its order."""
        limit = [("MemLimit", self.mem_limit >> 10, "kB")] if self.mem_limit else []
        return [
            ("DiskSize", self.nr_pages * PAGE_KIB, "kB"),
            *limit,
            ("NumReads", self.reads, ""),
            ("NumWrites", self.writes, ""),
            ("FailedReads", self.failed_reads, ""),
            ("FailedWrites", self.failed_writes, ""),
            ("InvalidIO", self.invalid_io, ""),
            ("NotifyFree", self.notify_free, ""),
            ("PagesDiscard", self.discards, ""),
            ("ZeroPages", self.same_pages, ""),
            ("GoodCompress", self._percent(self.good_pages), "%"),
            ("NoCompress", self._percent(self.raw_pages), "%"),
            ("PagesStored", self.pages_stored, ""),
            ("PagesUsed", self.mem_used_bytes // 4096, ""),
            ("OrigDataSize", self.pages_stored * PAGE_KIB, "kB"),
            ("ComprDataSize", self.compr_bytes >> 10, "kB"),
            ("MemUsedTotal", self.mem_used_bytes >> 10, "kB"),
            ("Fragmentation", round(self.fragmentation, 2), ""),
            ("MemUsedMax", self.mem_max_bytes >> 10, "kB"),
            ("PagesCompacted", self.pages_compacted, ""),
            ("PagesReturned", self.pages_returned, ""),
            ("ReserveSize", self.reserve_bytes >> 10, "kB"),
            ("TableSize", self.table_bytes >> 10, "kB"),
            ("DaemonRSS", self.daemon_rss >> 10, "kB"),
            ("Restarts", self.restarts, ""),
        ]

    def rzstats(self) -> str:
        """Return the text of ``.stats``: compcache's fields, then zswapfs's own."""
        lines = []
        for name, value, unit in self.fields():
            number = f"{value:8.2f}" if isinstance(value, float) else f"{value:8d}"
            lines.append(f"{name}:\t{number}{' ' if unit else ''}{unit}\n")
        return "".join(lines)

    def json(self) -> str:
        """Return the fields as a JSON object, with everything counted under ``raw``."""
        values: dict[str, object] = {name: value for name, value, _ in self.fields()}
        values["raw"] = asdict(self)
        return json.dumps(values, indent=2) + "\n"

    def prometheus(self) -> str:
        """Return Prometheus text; sizes in bytes, counters with ``_total``."""
        lines = []
        for name, kind, value, text in self._metrics():
            lines += [f"# HELP zswapfs_{name} {text}", f"# TYPE zswapfs_{name} {kind}"]
            lines.append(f"zswapfs_{name} {value}")
        return "\n".join(lines) + "\n"

    def _metrics(self) -> list[tuple[str, str, int | float, str]]:
        page = 4096
        return [
            ("disk_size_bytes", "gauge", self.nr_pages * page, "Uncompressed capacity."),
            ("mem_limit_bytes", "gauge", self.mem_limit, "Cap on the arena, 0 without one."),
            ("read_pages_total", "counter", self.reads, "Pages read."),
            ("written_pages_total", "counter", self.writes, "Pages written."),
            ("failed_read_pages_total", "counter", self.failed_reads, "Damaged pages read."),
            ("failed_write_pages_total", "counter", self.failed_writes, "Pages not stored."),
            ("invalid_requests_total", "counter", self.invalid_io, "Malformed requests."),
            ("freed_pages_total", "counter", self.notify_free, "Discarded pages with content."),
            ("discarded_pages_total", "counter", self.discards, "Pages named by discards."),
            ("same_filled_pages", "gauge", self.same_pages, "Pages of one repeated word."),
            ("stored_pages", "gauge", self.pages_stored, "Pages held in the arena."),
            ("good_pages", "gauge", self.good_pages, "Stored pages of half a page or less."),
            ("raw_pages", "gauge", self.raw_pages, "Stored pages kept uncompressed."),
            ("compressed_bytes", "gauge", self.compr_bytes, "Sum of the stored lengths."),
            ("mem_used_bytes", "gauge", self.mem_used_bytes, "What the arena occupies."),
            ("mem_used_max_bytes", "gauge", self.mem_max_bytes, "Its highest value."),
            ("fragmentation_ratio", "gauge", round(self.fragmentation, 4), "Used to compressed."),
            ("moved_blocks_total", "counter", self.pages_compacted, "Blocks moved."),
            ("returned_pages_total", "counter", self.pages_returned, "Pages given to the OS."),
            ("reserve_bytes", "gauge", self.reserve_bytes, "Populated chunks held ready."),
            ("table_bytes", "gauge", self.table_bytes, "Resident tables."),
            ("daemon_rss_bytes", "gauge", self.daemon_rss, "The daemon's own memory."),
            ("restarts_total", "counter", self.restarts, "Recoveries of the worker."),
        ]
