"""Put the system into a state, and back.

Each is a context manager, so that whatever ends a benchmark, an error or a signal, undoes what it
has done, in the reverse order.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ZSWAPFS = (sys.executable, "-P", "-m", "zswapfs")
PRIORITY = "32767"
"""Of the swap under test: above whatever else is on."""
TIMEOUT = 60
_numbers = itertools.count()
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Missing(Exception):  # noqa: N818 not an error: the contender is left out
    """This machine lacks what a contender needs."""


@dataclass(frozen=True)
class Device:
    """What is measured: a block device, and the file behind it where one can be opened."""

    block: Path
    file: Path | None = None
    zswapfs: Path | None = None
    """Its mountpoint, where it is one."""


def run(*words: object, env: dict[str, str] | None = None) -> str:
    """Run a command; return what it prints. Raises SystemExit with what it complains of."""
    try:
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
        )
    except FileNotFoundError:
        raise Missing(f"{words[0]} is not installed") from None
    if done.returncode:
        raise SystemExit(f"{words[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def undo(*words: object, env: dict[str, str] | None = None) -> None:
    """Run a command on the way back; what fails is said, and the rest is undone all the same."""
    try:
        run(*words, env=env)
    except (SystemExit, Missing, subprocess.TimeoutExpired) as error:
        print(f"could not undo: {error}", file=sys.stderr)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make signals unwind; while that goes on, further ones are ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {each: signal.signal(each, stop) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def setting(file: Path, value: str) -> Iterator[None]:
    """Write to a file of /proc or /sys; write back what was there."""
    before = file.read_text().strip()
    try:
        file.write_text(value)
        yield
    finally:
        file.write_text(before)


@contextlib.contextmanager
def no_zswap() -> Iterator[None]:
    """Turn zswap off, which would stand in front of every swap device."""
    switch = Path("/sys/module/zswap/parameters/enabled")
    with contextlib.ExitStack() as stack:
        if switch.exists() and switch.read_text().strip() == "Y":
            stack.enter_context(setting(switch, "N"))
        yield


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Make a directory to mount at."""
    path = Path(tempfile.mkdtemp(prefix="zswapfs-bench-"))
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def tmpfs(mib: int) -> Iterator[Path]:
    """Mount a tmpfs, one that is never swapped out where the kernel can."""
    with folder() as path:
        options = f"size={mib}M,mode=700"
        try:
            run("mount", "-t", "tmpfs", "-o", f"noswap,{options}", "zswapfs-bench", path)
        except SystemExit:
            run("mount", "-t", "tmpfs", "-o", options, "zswapfs-bench", path)
        try:
            yield path
        finally:
            undo("umount", path)


@contextlib.contextmanager
def loop(file: Path) -> Iterator[Path]:
    """Attach a loop device, with direct I/O and sectors of 4 KiB."""
    words = ("losetup", "--direct-io=on", "--sector-size", "4096", "-f", "--show")
    device = Path(run(*words, file).strip())
    try:
        direct = Path("/sys/block", device.name, "loop/dio").read_text().strip()
        if direct != "1":
            raise SystemExit(f"{device}: no direct I/O on {file}")
        yield device
    finally:
        undo("losetup", "-d", device)


@contextlib.contextmanager
def swap(device: Path, *, discard: bool) -> Iterator[None]:
    """Make swap and turn it on."""
    run("mkswap", device)
    run("swapon", *(["--discard"] if discard else []), "--priority", PRIORITY, device)
    try:
        yield
    finally:
        undo("swapoff", device)


@contextlib.contextmanager
def zram(mib: int) -> Iterator[Device]:
    """Set up a zram device with lz4: the first one that nobody uses, or a new one."""
    control = Path("/sys/class/zram-control")
    if not control.exists():
        subprocess.run(["modprobe", "zram"], check=False, capture_output=True)
    if not control.exists():
        raise Missing("no zram in this kernel")
    number, is_new = 0, False
    while (sysfs := Path(f"/sys/block/zram{number}")).exists():
        if (sysfs / "disksize").read_text().strip() == "0":
            break
        number += 1
    else:
        number, is_new = int((control / "hot_add").read_text()), True
        sysfs = Path(f"/sys/block/zram{number}")
    algorithms = (sysfs / "comp_algorithm").read_text()
    before = algorithms.partition("[")[2].partition("]")[0]
    try:
        (sysfs / "comp_algorithm").write_text("lz4")
        (sysfs / "disksize").write_text(f"{mib}M")
        yield Device(Path("/dev", sysfs.name))
    finally:
        (sysfs / "reset").write_text("1")
        (sysfs / "comp_algorithm").write_text(before)
        if is_new:
            (control / "hot_remove").write_text(str(number))


@contextlib.contextmanager
def uncompressed(mib: int) -> Iterator[Device]:
    """Set up a loop device on a sparse file in tmpfs."""
    with tmpfs(mib + 16) as path:
        file = path / "swap"
        with file.open("wb") as empty:
            empty.truncate(mib << 20)
        with loop(file) as block:
            yield Device(block, file)


@contextlib.contextmanager
def zswapfs(mib: int, options: str = "") -> Iterator[Device]:
    """Mount zswapfs and attach a loop device."""
    words = f"size={mib}M" + (f",{options}" if options else "")
    with folder() as path:
        run(*ZSWAPFS, "mount", path, "-o", words)
        try:
            with loop(path / "swap") as block:
                yield Device(block, path / "swap", path)
        finally:
            undo("umount", path)


@contextlib.contextmanager
def zswapfs_up(mib: int, options: str = "", env: dict[str, str] | None = None) -> Iterator[Device]:
    """Turn zswapfs on as users do."""
    words = ["--size", f"{mib}M", "--priority", PRIORITY, *(["-o", options] if options else [])]
    with folder() as path:
        said = run(*ZSWAPFS, "up", path, *words, env=env)
        try:
            device = next(word for word in said.split() if word.startswith("/dev/loop"))
            yield Device(Path(device.rstrip(",")), None, path)
        finally:
            undo(*ZSWAPFS, "down", path, env=env)


@contextlib.contextmanager
def cgroup(mib: int) -> Iterator[Path]:
    """Make a memory cgroup, of version 1 or 2, with a limit; kill what is in it afterwards."""
    root, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    with contextlib.ExitStack() as stack:
        if not (root / limit).exists():
            root, limit = Path("/sys/fs/cgroup"), "memory.max"
            control = root / "cgroup.subtree_control"
            if not control.exists():
                raise SystemExit(
                    "no memory cgroups here: swap would be loaded by the whole machine"
                )
            if "memory" not in control.read_text().split():
                stack.callback(control.write_text, "-memory")
                control.write_text("+memory")
        group = root / f"zswapfs-bench-{os.getpid()}-{next(_numbers)}"
        group.mkdir()
        stack.callback(_empty, group)
        (group / limit).write_text(str(mib << 20))
        yield group


def _empty(group: Path) -> None:
    """Kill what is in a cgroup, and remove it."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)
    print(f"could not undo: {group} is in use", file=sys.stderr)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a daemon that has nothing left to serve."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def nbdkit(mib: int) -> Iterator[Device]:
    """Start nbdkit's compressed memory behind nbdfuse, and attach a loop device."""
    for tool in ("nbdkit", "nbdfuse"):
        if shutil.which(tool) is None:
            raise Missing(f"{tool} is not installed (packages nbdkit and libnbd-bin)")
    with contextlib.ExitStack() as stack:
        path, mountpoint = stack.enter_context(folder()), stack.enter_context(folder())
        socket = path / "socket"
        stack.callback(socket.unlink, missing_ok=True)
        serve = ["nbdkit", "--swap", "--foreground", "--unix", socket]
        stack.callback(_stop, subprocess.Popen([*serve, "memory", f"{mib}M", "allocator=zstd"]))
        _wait(socket)
        stack.callback(
            _stop, subprocess.Popen(["nbdfuse", mountpoint / "swap", "--unix", str(socket)])
        )
        file = mountpoint / "swap"
        _wait(file)
        stack.callback(undo, "umount", mountpoint)
        yield Device(stack.enter_context(loop(file)), file)


def _wait(path: Path) -> None:
    """Wait until a daemon has made a file."""
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        if time.monotonic() > end:
            raise SystemExit(f"{path}: not there after {TIMEOUT} s")
        time.sleep(0.05)
