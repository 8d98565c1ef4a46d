#!/usr/bin/env python3
"""Make files of real memory pages: start small programs, take their private writable pages.

    make_corpus.py OUTDIR [--mib 12]

Writes OUTDIR/<name>.pages, whole 4096-byte pages in address order. Needs the right to read
/proc/PID/mem of one's own children. A program that is not installed is left out, and said so.
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PAGE_BYTES = 4096
PRESENT = 63
"""Bit of a page's entry in /proc/PID/pagemap."""

PYTHON_HEAP = """
import ast, collections, glob, os, random, re, time
random.seed(1)
lib = os.path.dirname(os.__file__)
sources = [open(f, errors="replace").read() for f in sorted(glob.glob(lib + "/*.py"))[:150]]
trees = [ast.parse(s) for s in sources[:60]]
index = collections.defaultdict(list)
for i, s in enumerate(sources):
    for w in re.findall(r"\\w+", s):
        index[w].append(i)
people = [{"id": i, "name": f"user{i}", "email": f"u{i}@example.com",
           "tags": [random.choice(["a", "b", "cc", "ddd"]) for _ in range(5)],
           "score": random.random()} for i in range(60000)]
print("ready", flush=True); time.sleep(600)
"""
SQLITE_DB = """
import random, sqlite3, time
random.seed(2)
c = sqlite3.connect(":memory:")
c.execute("create table t(id integer primary key, name text, ts text, v real)")
c.executemany("insert into t values(?,?,?,?)", ((i, "customer %d" % random.randrange(5000),
    "2026-01-%02dT%02d:00:00" % (i % 28 + 1, i % 24), random.random()) for i in range(300000)))
c.execute("create index ix on t(name, ts)")
print("ready", flush=True); time.sleep(600)
"""
ARRAYS = """
import array, random, time
random.seed(0)
a = array.array("d", (random.gauss(0, 1) for _ in range(400000)))
b = array.array("q", (random.randrange(1000) for _ in range(600000)))
c = array.array("d", [0.0]) * 400000
s = 0.0
d = array.array("f")
for _ in range(600000):
    s += random.gauss(0, 1); d.append(s)
e = bytearray(int(40 * random.random() + (i % 3000) / 15) for i in range(2000000))
print("ready", flush=True); time.sleep(600)
"""
NODE_HEAP = """
const a = [];
for (let i = 0; i < 200000; i++) a.push({id: i, name: 'item' + i, price: (i * 7919 % 10007) / 100,
  t: new Date(1e12 + i * 1000).toISOString()});
const m = new Map(a.map(x => [x.name, x])); const s = JSON.stringify(a);
console.log('ready'); setTimeout(() => console.log(m.size, s.length), 600000);
"""
PROGRAMS = {
    "python-heap": [sys.executable, "-c", PYTHON_HEAP],
    "sqlite-db": [sys.executable, "-c", SQLITE_DB],
    "arrays": [sys.executable, "-c", ARRAYS],
    "node-heap": ["node", "-e", NODE_HEAP],
}


def resident_pages(pid: int, limit_bytes: int) -> Iterator[bytes]:
    """Yield the resident pages of the process's private writable mappings, in address order."""
    proc = Path(f"/proc/{pid}")
    with (proc / "mem").open("rb", 0) as mem, (proc / "pagemap").open("rb", 0) as pagemap:
        for line in (proc / "maps").read_text().splitlines():
            where, mode, *_ = line.split()
            if not re.match("rw.p", mode) or "[v" in line:
                continue
            start, end = (int(address, 16) for address in where.split("-"))
            pagemap.seek(start // PAGE_BYTES * 8)
            entries = memoryview(pagemap.read((end - start) // PAGE_BYTES * 8)).cast("Q")
            for i, entry in enumerate(entries):
                if not entry >> PRESENT:
                    continue
                mem.seek(start + i * PAGE_BYTES)
                yield mem.read(PAGE_BYTES)
                limit_bytes -= PAGE_BYTES
                if limit_bytes <= 0:
                    return


def main() -> None:
    """Run the programs side by side and take each one's pages when it says that it is ready."""
    parser = argparse.ArgumentParser(description="Make files of real memory pages.")
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--mib", type=int, default=12, help="MiB of pages from each program")
    args = parser.parse_args()
    args.outdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        running = {}
        for name, (program, *words) in PROGRAMS.items():
            path = shutil.which(program)
            if path is None:
                print(f"{name}: left out, no {program} here", file=sys.stderr)
                continue
            child = subprocess.Popen(
                [path, *words], env={"PATH": "/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            running[name] = child
        for name, child in running.items():
            if child.stdout is None or child.stdout.readline().strip() != "ready":
                raise SystemExit(f"{name}: its program ended early")
            time.sleep(0.2)
            out = args.outdir / f"{name}.pages"
            with out.open("wb") as f:
                f.writelines(resident_pages(child.pid, args.mib << 20))
            print(f"{out} {out.stat().st_size // PAGE_BYTES} pages")


if __name__ == "__main__":
    main()
