"""A memory load that verifies itself; run as a process of its own, inside a memory cgroup.

    load.py PAGES_FILE MIB SEED [ROUNDS]

Fills MIB of anonymous memory with pages of PAGES_FILE, each marked with its number, then reads
every page back in random order and compares, ROUNDS times. SIGTERM ends it at once; SIGUSR1 when
the round under way and another whole one are through, so that each page has been compared since.
Tells how many pages it has compared. Exits 0 when every byte was right.
"""

import mmap
import random
import signal
import sys
from pathlib import Path

PAGE = 4096


def main() -> int:
    """Run the load; return the exit code."""
    stop, finish = [], []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    signal.signal(signal.SIGUSR1, lambda *_: finish.append(True))
    pages = Path(sys.argv[1]).read_bytes()
    count = int(sys.argv[2]) * 256
    seed = int(sys.argv[3])
    rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    total = len(pages) // PAGE
    memory = mmap.mmap(-1, count * PAGE)

    def expected(number: int) -> bytes:
        at = (number * 7919 + seed) % total * PAGE
        mark = f"{seed}:{number};".encode()
        return mark + pages[at + len(mark) : at + PAGE]

    for number in range(count):
        if stop:
            break
        memory[number * PAGE : (number + 1) * PAGE] = expected(number)
    order = list(range(count))
    compared = wrong = 0
    last = False
    while rounds > 0 and not stop and not last:
        rounds -= 1
        last = bool(finish)
        random.Random(seed).shuffle(order)
        for number in order:
            if stop:
                break
            compared += 1
            if memory[number * PAGE : (number + 1) * PAGE] != expected(number):
                wrong += 1
    print(f"{count} pages, {wrong} wrong, {compared} compared")
    return 1 if wrong else 0


sys.exit(main())
