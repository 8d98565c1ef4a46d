"""Up and down: in the right order, back where they came from, mended when killed."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    TIMEOUT,
    ZSWAPFS,
    Mounted,
    Swapped,
    loops_below,
    mount_strange,
    run,
    take_down,
    zswapfs,
)

from zswapfs import swap
from zswapfs.config import run_file

pytestmark = pytest.mark.swapped

LOAD = Path(__file__).with_name("load.py")


def _nothing_is_left(place: Path) -> None:
    assert not place.is_mount()
    assert loops_below(os.fsencode(place)) == []


def test_up_and_down(place: Path) -> None:
    """And once more, with everything gone in between."""
    for _ in range(2):
        done = zswapfs("up", place, "--size", "128M", "--priority", "7")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("zswapfs: 128 MiB of swap on /dev/loop")
        device = done.stdout.split(" on ")[1].split(",")[0]
        line = Path("/proc/swaps").read_text().partition(device)[2].split()
        assert line[1:4] == [str((128 << 10) - 4), "0", "7"]
        assert zswapfs("down", place).returncode == 0
        _nothing_is_left(place)


def test_up_twice(swapped_on: Callable[..., Swapped]) -> None:
    """Refused, and the first goes on."""
    swap = swapped_on("--size", "128M")
    done = zswapfs("up", swap.path)
    assert done.returncode == 1
    assert done.stderr == f"zswapfs: {swap.path}: already up, on {swap.device}\n"
    assert swap.stats()["DiskSize"] == 128 << 10


def test_down_of_what_is_not_up(place: Path, mount: Callable[..., Mounted]) -> None:
    """Nothing there, or a mount that 'up' did not make: neither is touched."""
    done = zswapfs("down", place)
    assert (done.returncode, done.stderr) == (1, f"zswapfs: {place}: not up\n")
    mounted = mount()
    assert zswapfs("down", mounted.path).returncode == 1
    assert mounted.file.exists()
    assert zswapfs("up", mounted.path).returncode == 1
    assert mounted.file.exists()


def test_umount_while_swapped_on(swapped_on: Callable[..., Swapped]) -> None:
    """The kernel refuses; all goes on."""
    swap = swapped_on("--size", "128M")
    assert run("umount", swap.path).returncode != 0
    assert swap.device in Path("/proc/swaps").read_text()
    assert swap.stats()["DiskSize"] == 128 << 10


def _swapped_out(swap: Swapped, corpus_file: Path) -> "subprocess.Popen[str]":
    """Return a load of 160 MiB, most of it in swap; its cgroup has 64 MiB."""
    load = swap.load(64, sys.executable, LOAD, corpus_file, 160, 5, 6)
    for _ in range(200):
        if swap.stats()["PagesStored"] > 20_000:
            return load
        time.sleep(0.05)
    raise AssertionError("20 000 pages are not in swap")


def _limit(group: Path, mib: int) -> None:
    for name in ("memory.limit_in_bytes", "memory.max"):
        if (group / name).exists():
            (group / name).write_text(str(mib << 20))


def test_down_brings_pages_back(swapped_on: Callable[..., Swapped], corpus_file: Path) -> None:
    """A process whose pages are in swap keeps them, byte for byte."""
    swap = swapped_on("--size", "512M")
    load = _swapped_out(swap, corpus_file)
    _limit(swap.groups[0], 512)
    assert load.poll() is None
    done = zswapfs("down", swap.path)
    assert done.returncode == 0, done.stderr
    _nothing_is_left(swap.path)
    out, _ = load.communicate(timeout=120)
    assert load.returncode == 0
    assert " 0 wrong" in out


def _is_gone(mounted: Mounted) -> bool:
    return not mounted.path.is_mount() and not mounted.daemon()


def test_sigterm_brings_pages_back(swapped_on: Callable[..., Swapped], corpus_file: Path) -> None:
    """As 'down' does: swap goes off, then the mount, then the daemon."""
    swap = swapped_on("--size", "512M")
    load = _swapped_out(swap, corpus_file)
    _limit(swap.groups[0], 512)
    supervisor = min(swap.daemon())
    os.kill(supervisor, signal.SIGTERM)
    for _ in range(600):
        if _is_gone(swap):
            break
        time.sleep(0.1)
    _nothing_is_left(swap.path)
    assert load.poll() is None
    out, _ = load.communicate(timeout=120)
    assert load.returncode == 0
    assert " 0 wrong" in out


def test_sigterm_without_room_changes_nothing(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """To either process; it is said in the kernel's log."""
    swap = swapped_on("--size", "512M")
    if len(Path("/proc/swaps").read_text().splitlines()) > 2:
        pytest.skip("other swap is on, which can take the pages")
    load = _swapped_out(swap, corpus_file)
    before = swap.daemon()
    for process in before:
        os.kill(process, signal.SIGTERM)
    said = f"{swap.path}: in use, goes on: {swap.path}: memory cgroup {swap.groups[0]} has "
    for _ in range(100):
        if said in run("dmesg").stdout:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("nothing is said")
    assert swap.daemon() == before
    assert swap.device in Path("/proc/swaps").read_text()
    assert load.poll() is None
    load.kill()
    load.communicate()


def test_down_kills_nobody_in_a_full_cgroup(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """The machine has room, the cgroup has none: said in one line, and all goes on."""
    swap = swapped_on("--size", "512M")
    if len(Path("/proc/swaps").read_text().splitlines()) > 2:
        pytest.skip("other swap is on, which can take the pages")
    load = _swapped_out(swap, corpus_file)
    done = zswapfs("down", swap.path)
    assert done.returncode == 1
    assert f"memory cgroup {swap.groups[0]} has " in done.stderr
    assert done.stderr.count("\n") == 1
    assert swap.device in Path("/proc/swaps").read_text()
    assert load.poll() is None
    load.kill()
    load.communicate()


def test_down_without_memory_says_so(swapped_on: Callable[..., Swapped], place: Path) -> None:
    """Seen through a /proc/meminfo that has none; swap in memory is no room. Nothing is changed."""
    swap = swapped_on("--size", "128M")
    fake = place.with_name("meminfo")
    fake.write_text("MemAvailable:       0 kB\n")
    swaps = place.with_name("swaps")
    lines = f"{swap.device} partition 131068 50000 100\n/dev/zram0 partition 1048576 0 50\n"
    swaps.write_text("Filename Type Size Used Priority\n" + lines)
    command = f"mount --bind {fake} /proc/meminfo && mount --bind {swaps} /proc/swaps && "
    done = run("unshare", "-m", "sh", "-c", f"{command} exec {ZSWAPFS} down {swap.path}")
    assert done.returncode == 1
    assert "48 MiB are in swap and only 0 MiB of memory are free" in done.stderr
    assert swap.device in Path("/proc/swaps").read_text()
    assert swap.stats()["DiskSize"] == 128 << 10


BROKEN = {
    "losetup": "losetup: cannot find an unused loop device",
    "mkswap": "mkswap: cannot write",
    "swapon": "swapon: /dev/loop9: swapon failed: Invalid argument",
}


@pytest.mark.parametrize("tool", BROKEN)
def test_a_refused_step_takes_down_what_was_set_up(place: Path, tool: str) -> None:
    """No free loop device, no mkswap, no swapon: the tool's own line, and nothing left."""
    folder = place.with_name("bin")
    folder.mkdir()
    (folder / tool).write_text(
        f'#!/bin/sh\n[ "$1" = -d ] && exec /sbin/{tool} "$@"\necho \'{BROKEN[tool]}\' >&2\nexit 1\n'
    )
    (folder / tool).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        [ZSWAPFS, "up", place, "--size", "64M"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"zswapfs: {BROKEN[tool]}\n"
    _nothing_is_left(place)


@pytest.mark.parametrize("tool", ["losetup", "mkswap", "swapon"])
@pytest.mark.parametrize("then", ["up", "down"])
def test_an_up_that_was_killed_is_mended(place: Path, tool: str, then: str) -> None:
    """Killed where no cleaning up is possible: the next up or down finds what is there."""
    folder = place.with_name("bin")
    folder.mkdir()
    (folder / tool).write_text("#!/bin/sh\nkill -9 $PPID\nexit 1\n")
    (folder / tool).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    killed = subprocess.run([ZSWAPFS, "up", place, "--size", "64M"], env=env, check=False)
    assert killed.returncode == -9
    assert place.is_mount()
    done = zswapfs(then, place, *(["--size", "64M"] if then == "up" else []))
    assert done.returncode == 0, done.stderr
    if then == "up":
        assert zswapfs("down", place).returncode == 0
    _nothing_is_left(place)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "0"], "size: '0' is less than one page"),
        (["--size", "-1G"], "size: '-1G' is not a size"),
        (["--size", "100T"], "more than slots can address"),
        (["--mem-limit", "4M"], "leaves nothing beside the reserve"),
        (["--priority", "x"], "priority: 'x' is not a number"),
        (["--priority", "32768"], "priority"),
        (["-o", "nonsense=1"], "unknown option 'nonsense'"),
    ],
)
def test_bad_input_is_one_line(place: Path, words: list[str], message: str) -> None:
    """Exit code 1, nothing changed."""
    done = zswapfs("up", place, *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    _nothing_is_left(place)


def test_a_swapon_that_the_kernel_refuses(place: Path) -> None:
    """A signature that is gone by then: the kernel's reason, and nothing left."""
    folder = place.with_name("bin")
    folder.mkdir()
    (folder / "mkswap").write_text("#!/bin/sh\nexit 0\n")
    (folder / "mkswap").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    words = [ZSWAPFS, "up", place, "--size", "64M"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "swapon" in done.stderr
    assert done.stderr.count("\n") == 1
    _nothing_is_left(place)


def test_a_swapoff_that_fails_changes_nothing(swapped_on: Callable[..., Swapped]) -> None:
    """Its own line; swap stays on."""
    swapped = swapped_on("--size", "64M")
    folder = swapped.path.with_name("bin")
    folder.mkdir()
    (folder / "swapoff").write_text("#!/bin/sh\necho swapoff: no >&2\nexit 4\n")
    (folder / "swapoff").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    words = [ZSWAPFS, "down", swapped.path]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "zswapfs: swapoff: no\n")
    assert swapped.device in Path("/proc/swaps").read_text()
    assert swapped.stats()["DiskSize"] == 64 << 10


def _is_stuck(process: "subprocess.Popen[bytes]") -> bool:
    """Say whether a process waits in the kernel, and not just for a moment."""
    for _ in range(10):
        if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "D":
            return False
        time.sleep(0.02)
    return True


def test_a_down_waits_for_another_swapoff(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """As systemd starts one at shutdown: held up here by a worker that stands still."""
    swapped = swapped_on("--size", "512M", "-o", "heartbeat=0")
    load = _swapped_out(swapped, corpus_file)
    _limit(swapped.groups[0], 512)
    worker = max(swapped.daemon())
    os.kill(worker, signal.SIGSTOP)
    try:
        other = subprocess.Popen(["swapoff", swapped.device])
        end = time.monotonic() + TIMEOUT
        while not _is_stuck(other):
            assert time.monotonic() < end
        down = subprocess.Popen([ZSWAPFS, "down", swapped.path])
        time.sleep(1)
        assert down.poll() is None
    finally:
        os.kill(worker, signal.SIGCONT)
    assert other.wait(TIMEOUT) == 0
    assert down.wait(TIMEOUT) == 0
    _nothing_is_left(swapped.path)
    out, _ = load.communicate(timeout=120)
    assert load.returncode == 0
    assert " 0 wrong" in out


def test_a_swapoff_after_one_that_failed(swapped_on: Callable[..., Swapped]) -> None:
    """The kernel finds no such swap for a while, in whatever language; then it does."""
    swapped = swapped_on("--size", "64M")
    folder = swapped.path.with_name("bin")
    folder.mkdir()
    (folder / "swapoff").write_text(
        f"#!/bin/sh\n[ $LC_ALL = C ] && [ -e {folder}/twice ] && exec /sbin/swapoff $1\n"
        f"[ -e {folder}/once ] && >{folder}/twice\n>{folder}/once\n"
        'echo "swapoff: $1: swapoff failed: Invalid argument" >&2\nexit 4\n'
    )
    (folder / "swapoff").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    words = [ZSWAPFS, "down", swapped.path]
    done = subprocess.run(words, env=env, timeout=TIMEOUT, check=False)
    assert done.returncode == 0
    _nothing_is_left(swapped.path)


def test_an_interrupted_down_can_be_repeated(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """While pages come back: what is left is whole, and the load's pages are right."""
    swapped = swapped_on("--size", "512M")
    load = _swapped_out(swapped, corpus_file)
    _limit(swapped.groups[0], 512)
    down = subprocess.Popen([ZSWAPFS, "down", swapped.path], stderr=subprocess.DEVNULL)
    time.sleep(0.25)
    down.send_signal(signal.SIGINT)
    if down.wait(TIMEOUT):
        assert zswapfs("down", swapped.path).returncode == 0
    _nothing_is_left(swapped.path)
    out, _ = load.communicate(timeout=120)
    assert load.returncode == 0
    assert " 0 wrong" in out


def test_a_swap_file_too_small_for_mkswap(place: Path) -> None:
    """Mkswap wants ten pages: its line, and nothing left."""
    done = zswapfs("up", place, "--size", "16K")
    assert done.returncode == 1
    assert "mkswap" in done.stderr
    _nothing_is_left(place)
    take_down(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_that_is_interrupted_takes_everything_down(place: Path, number: int) -> None:
    """While mkswap is at work."""
    folder = place.with_name("bin")
    folder.mkdir()
    (folder / "mkswap").write_text(f"#!/bin/sh\nkill -{int(number)} $PPID\nsleep 1\nexit 1\n")
    (folder / "mkswap").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([ZSWAPFS, "up", place, "--size", "64M"], env=env, check=False)
    assert done.returncode in (1, 143)
    _nothing_is_left(place)


def test_a_second_interruption_while_up_cleans_up(place: Path) -> None:
    """As a terminal sends it, to the whole group: what takes down goes on."""
    folder = place.with_name("bin")
    folder.mkdir()
    (folder / "mkswap").write_text("#!/bin/sh\nkill -INT -$PPID\nsleep 60\n")
    (folder / "losetup").write_text(
        '#!/bin/sh\n[ "$1" = -d ] && kill -INT -$PPID\nexec /sbin/losetup "$@"\n'
    )
    for tool in folder.iterdir():
        tool.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    words = [ZSWAPFS, "up", place, "--size", "64M"]
    began = time.monotonic()
    up = subprocess.Popen(words, env=env, process_group=0, stderr=subprocess.PIPE)
    assert up.communicate(timeout=TIMEOUT)[1] == b"\nAborted!\n"
    assert up.returncode == 1
    assert time.monotonic() - began < 50
    _nothing_is_left(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_interrupted_in_swapon(place: Path, number: int) -> None:
    """Which takes seconds for 1 TiB and cannot be interrupted: up, or nothing left behind."""
    up = subprocess.Popen([ZSWAPFS, "up", place, "--size", "1T"], stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{up.pid}/task/{up.pid}/children")
    end = time.monotonic() + TIMEOUT
    seen = False
    while not seen:
        assert time.monotonic() < end
        for child in children.read_text().split():
            with contextlib.suppress(OSError):
                seen |= Path(f"/proc/{child}/comm").read_text() == "swapon\n"
    up.send_signal(number)
    assert up.wait(TIMEOUT) != 0
    _nothing_is_left(place)


@pytest.mark.parametrize(
    "name",
    [
        *("mnt \\040 é", "tab\tand\nline", "no\u00a0break", "wide\u3000blank", "line\u2028end"),
        *("form\x0cfeed\x0b\x85", os.fsdecode(b"not \xff text")),
    ],
)
def test_a_mountpoint_with_a_strange_name(place: Path, name: str) -> None:
    """Blanks of all kinds, backslashes, and bytes that are no text; /proc escapes some of them."""
    strange = place.with_name(name)
    strange.mkdir()
    try:
        assert zswapfs("up", strange, "--size", "64M").returncode == 0
        again = zswapfs("up", strange, "--size", "64M")
        assert again.returncode == 1
        assert "already up" in again.stderr
        assert zswapfs("stats", strange).returncode == 0
        assert zswapfs("restart", strange).returncode == 0
        assert zswapfs("down", strange).returncode == 0
        _nothing_is_left(strange)
    finally:
        take_down(strange)


def test_another_command_is_waited_for(place: Path) -> None:
    """At the same mountpoint; other mountpoints are nobody's business."""
    fd = os.open(run_file(place, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    up = subprocess.Popen([ZSWAPFS, "up", place, "--size", "64M"], stderr=subprocess.PIPE)
    assert up.stderr is not None
    assert up.stderr.readline() == f"zswapfs: {place}: waiting for another command\n".encode()
    other = place.with_name("other")
    other.mkdir()
    assert zswapfs("up", other, "--size", "64M").returncode == 0
    assert zswapfs("down", other).returncode == 0
    assert not place.is_mount()
    os.close(fd)
    assert up.wait(TIMEOUT) == 0
    up.stderr.close()
    assert zswapfs("down", place).returncode == 0


def test_tools_of_a_killed_up_hold_its_lock(place: Path) -> None:
    """What swapon does is not over when 'up' is killed: the next command waits for it."""
    folder = place.with_name("bin")
    folder.mkdir()
    (folder / "swapon").write_text("#!/bin/sh\nkill -9 $PPID\nsleep 2\n")
    (folder / "swapon").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    words = [ZSWAPFS, "up", place, "--size", "64M"]
    assert subprocess.run(words, env=env, check=False).returncode == -9
    down = zswapfs("down", place)
    assert down.returncode == 0, down.stderr
    assert "waiting for another command" in down.stderr
    _nothing_is_left(place)


def test_loops_on_other_files_are_left_alone(place: Path) -> None:
    """A file called swap in a directory that is no zswapfs."""
    file = place / "swap"
    file.write_bytes(bytes(1 << 20))
    device = run("losetup", "-f", "--show", file).stdout.strip()
    try:
        for words in (("down", place), ("up", place)):
            done = zswapfs(*words)
            assert done.returncode == 1
            assert done.stderr.count("\n") == 1
        assert loops_below(os.fsencode(place)) == [device]
    finally:
        run("losetup", "-d", device)
        file.unlink()


def test_detaching_twice(place: Path) -> None:
    """What is gone, or another's by now, is detached."""
    file, other = place / "swap", place / "other"
    for each in (file, other):
        each.write_bytes(bytes(1 << 20))
    device = run("losetup", "-f", "--show", file).stdout.strip()
    swap.detach(device, other)
    assert loops_below(os.fsencode(place)) == [device]
    swap.detach(device, file)
    swap.detach(device, file)
    assert loops_below(os.fsencode(place)) == []
    for each in (file, other):
        each.unlink()


def test_what_a_dead_daemon_left_is_taken_down(swapped_on: Callable[..., Swapped]) -> None:
    """Supervisor and worker are killed; no page was in swap."""
    swapped = swapped_on("--size", "64M")
    for process in swapped.daemon():
        os.kill(process, signal.SIGKILL)
    done = zswapfs("down", swapped.path)
    assert done.returncode == 0, done.stderr
    _nothing_is_left(swapped.path)


def test_up_with_nowhere_to_say_so(place: Path) -> None:
    """It is up; that it cannot be said changes nothing."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [ZSWAPFS, "up", place, "--size", "64M"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert zswapfs("down", place).returncode == 0


def test_a_foreground_mount_that_fails(place: Path) -> None:
    """One line, after what protects it less, exit code 1, nothing left."""
    done = mount_strange(place, "failing_start", "-f")
    assert done.returncode == 1
    assert done.stderr.endswith(f"zswapfs: {place}: [Errno 12] nothing for 0\n")
    assert done.stderr.count("nothing") == 1
    _nothing_is_left(place)


def test_the_first_error_is_the_error(place: Path) -> None:
    """Where undoing fails, too, that is said beside it."""
    folder = place.with_name("bin")
    folder.mkdir()
    (folder / "mkswap").write_text("#!/bin/sh\necho first >&2\nexit 1\n")
    (folder / "losetup").write_text(
        '#!/bin/sh\n[ "$1" = -d ] && echo second >&2 && exit 1\nexec /sbin/losetup "$@"\n'
    )
    for tool in folder.iterdir():
        tool.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    words = [ZSWAPFS, "up", place, "--size", "64M"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "zswapfs: second\nzswapfs: first\n"
    assert zswapfs("down", place).returncode == 0
    _nothing_is_left(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_interrupted_at_any_moment_is_up_or_leaves_nothing(place: Path, number: int) -> None:
    """From the first import to the end: never anything between."""
    for step in range(8):
        up = subprocess.Popen([ZSWAPFS, "up", place, "--size", "64M"], stderr=subprocess.DEVNULL)
        time.sleep(0.05 * step)
        up.send_signal(number)
        if up.wait(TIMEOUT) == 0:
            assert zswapfs("down", place).returncode == 0
        _nothing_is_left(place)
