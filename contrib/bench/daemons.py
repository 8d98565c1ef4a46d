"""A daemon under load: verified loads in memory cgroups, kills, and what the kernel says."""

import contextlib
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import system
from common import PAGE, TOP, corpus_file

from zswapfs.check import find_processes

TROUBLE = ("BUG", "WARNING", "Oops", "hung task", "blocked for more", "I/O error", "Write-error")
READY_SECONDS = 30
LOG_SECONDS, LOG_BYTES = 20, 1 << 20
FEW_PAGES = 1000
"""mkswap, swapon and whoever looks what is on the device touch fewer."""


@dataclass
class Load:
    """A process in a memory cgroup of its own."""

    name: str
    process: "subprocess.Popen[str]"
    verdict: str | None = None
    """What a load that is told to end has to say, as a pattern; None: it says nothing."""

    def end(self, number: signal.Signals = signal.SIGTERM) -> list[str]:
        """Tell it to end; return what went wrong. None ends by itself, unless something has."""
        early = self.process.poll() is not None
        if not early:
            self.process.send_signal(number)
        said, _ = self.process.communicate(timeout=system.TIMEOUT)
        code = self.process.returncode
        if self.verdict is None:
            # fio ends with 128 when it is told to; what it found wrong, it says.
            good = code in (0, 128, -number) and "verify:" not in said
        else:
            good = code == 0 and re.search(self.verdict, said) is not None
        if good and not early:
            return []
        how = "ended by itself" if early else "ended"
        return [f"{self.name} {how} with {code}: {said.strip()[-300:]}"]


@contextlib.contextmanager
def load(name: str, limit_mib: int, *words: object, verdict: str | None = None) -> Iterator[Load]:
    """Run a command in a new memory cgroup; kill it at the end, if it still runs."""
    with system.cgroup(limit_mib) as group:
        inside = f'echo $$ >{group}/cgroup.procs && exec "$@"'
        process = subprocess.Popen(
            ["sh", "-c", inside, "sh", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield Load(name, process, verdict)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


COMPARED = r"\b0 wrong, [1-9]\d* compared"
"""The verdict of a load that has got as far as comparing, and found nothing."""


def verifying(mib: int, seed: int) -> list[object]:
    """Return the words of a load that touches its pages at random and compares them."""
    return [sys.executable, TOP / "tests" / "load.py", corpus_file(), mib, seed, 1_000_000]


def fio(file: Path, mib: int) -> list[str]:
    """Return the words of verified random writes at depth 16, without an end."""
    return [
        *("fio", "--name=x", f"--filename={file}", "--direct=1", "--ioengine=libaio"),
        *("--iodepth=16", "--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k"),
        *(f"--size={mib}M", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=512"),
        *("--verify_state_save=0", "--loops=1000000", "--buffer_compress_percentage=60"),
    ]


def mountpoint_of(device: system.Device) -> Path:
    """Return where a zswapfs is mounted. Raises SystemExit for any other device."""
    if device.zswapfs is None:
        raise SystemExit(f"{device.block}: no zswapfs")
    return device.zswapfs


def worker_of(mountpoint: Path) -> int:
    """Return the worker's process id; wait for it, if one is on its way."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if "worker" in (found := find_processes(mountpoint)):
            return found["worker"].pid
        time.sleep(0.005)
    raise SystemExit(f"{mountpoint}: no worker")


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


class Prober:
    """Reads pages of a mount's file, past all caches."""

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint
        self._fd = os.open(mountpoint / "swap", os.O_RDONLY | os.O_DIRECT)
        self._page = mmap.mmap(-1, PAGE)

    def kill(self) -> float:
        """Kill the worker; return the seconds until a page is answered again.

        The page is asked for when the worker has ended: until then its lanes may answer.
        """
        pid = worker_of(self._mountpoint)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while not _has_ended(pid):
            time.sleep(0.0005)
        os.preadv(self._fd, [self._page], 0)
        return time.monotonic() - began

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _is_logged(text: str, file: Path) -> bool:
    """Say something in the kernel's log; return whether who follows it has seen that."""
    mark = f"zswapfs-bench: {text} {os.getpid()} {time.monotonic()}"
    end = time.monotonic() + LOG_SECONDS
    while time.monotonic() < end:
        # Again and again: it may not follow yet. Unended, it would not be shown before the next.
        Path("/dev/kmsg").write_text(f"{mark}\n")
        time.sleep(0.2)
        if mark in file.read_text(errors="replace")[-LOG_BYTES:]:
            return True
    return False


@contextlib.contextmanager
def kernel_log() -> Iterator[list[str]]:
    """Yield a list that has, at the end, what the kernel has said of trouble meanwhile.

    It is followed all the time: the kernel itself keeps little of it.
    """
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="zswapfs-bench-log-") as folder:
        file = Path(folder) / "log"
        with file.open("w") as out, subprocess.Popen(["dmesg", "--follow-new"], stdout=out) as tool:
            try:
                began = _is_logged("begin", file)
                yield said
                ended = _is_logged("end", file)
            finally:
                tool.terminate()
        if not (began and ended):
            said.append("the kernel's log could not be followed")
        lines = file.read_text(errors="replace").splitlines()
        said += [line for line in lines if any(word in line for word in TROUBLE)]
