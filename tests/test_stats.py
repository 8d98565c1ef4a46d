"""The texts of .stats, .stats.json and .metrics."""

import json
import re

from zswapfs.stats import Stats
from zswapfs.store import Store

RZSTATS = (
    "DiskSize NumReads NumWrites FailedReads FailedWrites InvalidIO NotifyFree PagesDiscard "
    "ZeroPages GoodCompress NoCompress PagesStored PagesUsed OrigDataSize ComprDataSize "
    "MemUsedTotal"
).split()
OWN = (
    "Fragmentation MemUsedMax PagesCompacted PagesReturned ReserveSize TableSize DaemonRSS Restarts"
).split()


def _stats(corpus: list[bytes], mem_limit: int | None = None) -> Stats:
    with Store(4096, mem_limit) as store:
        for index, page in enumerate(corpus[:2000]):
            store.write(index, page)
        store.write(3000, bytes(4096))
        store.read(0, 10)
        store.discard(0, 100)
        return store.stats()


def test_rzstats_has_the_fields_in_order(corpus: list[bytes]) -> None:
    """Name, colon, tab, the value right-aligned in 8, the unit where there is one."""
    lines = _stats(corpus).rzstats().splitlines()
    assert [line.partition(":")[0] for line in lines] == RZSTATS + OWN
    for line in lines:
        assert re.fullmatch(r"\w+:\t(?=[ \d.]{8,}) *\d+(\.\d\d)?( kB| %)?", line), line


def test_mem_limit_appears_only_where_one_is_set(corpus: list[bytes]) -> None:
    """It comes behind DiskSize."""
    lines = _stats(corpus, 64 << 20).rzstats().splitlines()
    assert lines[1] == "MemLimit:\t   65536 kB"


def test_what_holds_between_the_fields(corpus: list[bytes]) -> None:
    """Sizes are pages times four, and the discards were counted."""
    stats = _stats(corpus)
    values = {name: value for name, value, _ in stats.fields()}
    assert values["DiskSize"] == 4096 * 4
    assert values["OrigDataSize"] == values["PagesStored"] * 4
    assert values["MemUsedTotal"] == values["PagesUsed"] * 4
    assert values["NumReads"] == 10
    assert values["NumWrites"] == 2001
    assert values["NotifyFree"] == values["PagesDiscard"] == 100
    assert values["PagesStored"] + values["ZeroPages"] == 2001 - 100
    assert values["Fragmentation"] == round(stats.mem_used_bytes / stats.compr_bytes, 2)


def test_json_says_the_same(corpus: list[bytes]) -> None:
    """And everything counted besides."""
    stats = _stats(corpus)
    values = json.loads(stats.json())
    assert values.pop("raw")["pages_stored"] == stats.pages_stored
    assert list(values) == RZSTATS + OWN


def test_metrics_are_prometheus_text(corpus: list[bytes]) -> None:
    """Help, type and one value for each."""
    lines = _stats(corpus).prometheus().splitlines()
    assert len(lines) % 3 == 0
    for about, kind, value in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        name = value.split()[0]
        assert about.startswith(f"# HELP {name} ")
        assert kind in (f"# TYPE {name} counter", f"# TYPE {name} gauge")
        assert name.endswith("_total") == kind.endswith("counter")
        float(value.split()[1])
