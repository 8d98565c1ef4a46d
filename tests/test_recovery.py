"""Workers that die, hang and are exchanged, under load that is verified."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TIMEOUT, ZSWAPFS, Mounted, Swapped, cgroup_root, mount_strange, run, zswapfs

from zswapfs import supervisor
from zswapfs.heartbeat import Heartbeat
from zswapfs.mount import restart_python
from zswapfs.store import Store

LOAD = Path(__file__).with_name("load.py")


def _processes(mounted: Mounted) -> tuple[int, int]:
    """Return supervisor and worker."""
    names = {(Path("/proc") / str(pid) / "comm").read_text(): pid for pid in mounted.daemon()}
    return names["zswapfs\n"], names["zswapfs-worker\n"]


def _wait_for(what: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def _new_worker(mounted: Mounted, old: int) -> int:
    """Wait for the next worker and return it."""
    found = [old]

    def is_there() -> bool:
        with contextlib.suppress(KeyError, OSError):
            found[0] = _processes(mounted)[1]
        return found[0] != old

    _wait_for(is_there)
    return found[0]


def _kill_at_random(mounted: Mounted, count: int, seed: int) -> None:
    chance = random.Random(seed)
    worker = _processes(mounted)[1]
    for _ in range(count):
        time.sleep(chance.uniform(0.05, 1.5))
        os.kill(worker, signal.SIGKILL)
        worker = _new_worker(mounted, worker)


@contextlib.contextmanager
def _region(mounted: Mounted) -> Iterator[int]:
    """Open the daemon's region, which outlives it then."""
    for entry in Path(f"/proc/{_processes(mounted)[0]}/fd").iterdir():
        if re.search(r"/#\d+ \(deleted\)|memfd:zswapfs", str(entry.readlink())):
            fd = os.open(entry, os.O_RDWR)
            break
    else:
        raise AssertionError("no region")
    try:
        yield fd
    finally:
        os.close(fd)


def _pattern(number: int) -> bytes:
    return random.Random(number).randbytes(2048) * 2


def _write(mounted: Mounted, page: bytes) -> None:
    with mounted.file.open("r+b") as file:
        file.write(page)


def _read(mounted: Mounted) -> bytes:
    with mounted.file.open("rb") as file:
        return file.read(4096)


@pytest.mark.swapped
def test_killed_workers_are_not_noticed_by_swap(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """Ten times kill -9 at random moments: no wrong byte, no task killed, no page leaked."""
    swap = swapped_on("--size", "512M")
    loads = [swap.load(64, sys.executable, LOAD, corpus_file, 160, seed, 6) for seed in (1, 2)]
    with _region(swap) as fd:
        _kill_at_random(swap, 10, 5)
        for load in loads:
            out, _ = load.communicate(timeout=2 * TIMEOUT)
            assert load.returncode == 0, out
            assert " 0 wrong" in out
        stats = swap.stats()
        assert stats["Restarts"] == 10
        assert stats["NumReads"] > 20_000
        assert stats["FailedReads"] == stats["FailedWrites"] == stats["InvalidIO"] == 0
        assert run("swapoff", swap.device).returncode == 0
        assert run("blkdiscard", swap.device).returncode == 0
        assert swap.stats()["PagesStored"] == 0
        _wait_for(lambda: swap.stats()["MemUsedTotal"] == 0)
        assert zswapfs("down", swap.path).returncode == 0
        with Store.adopt(fd) as store:
            store.check()
            assert store.stats().pages_stored == store.stats().mem_used_bytes == 0


@pytest.mark.mounted
def test_killed_workers_are_not_noticed_by_fio(mounted: Mounted) -> None:
    """Verified random writes at queue depth 16."""
    words = (
        *("fio", "--name=x", f"--filename={mounted.file}", "--direct=1", "--ioengine=libaio"),
        *("--iodepth=16", "--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--size=48M"),
        *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=512", "--loops=40"),
        *("--buffer_compress_percentage=60", "--rate_iops=4000", "--verify_state_save=0"),
    )
    fio = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _kill_at_random(mounted, 6, 7)
        assert fio.poll() is None
    finally:
        fio.send_signal(signal.SIGINT)
        out, _ = fio.communicate(timeout=TIMEOUT)
    assert "verify:" not in out
    assert "error" not in out.replace("err= 0", ""), out
    assert mounted.stats()["Restarts"] == 6
    assert mounted.stats()["FailedReads"] == 0


@pytest.mark.mounted
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_any_death_is_survived(mounted: Mounted, number: signal.Signals) -> None:
    """What was written is there; a handle that the dead worker gave out still reads."""
    _write(mounted, _pattern(1))
    worker = _processes(mounted)[1]
    with (mounted.path / ".stats").open() as stats, mounted.file.open("rb") as file:
        os.kill(worker, number)
        _new_worker(mounted, worker)
        assert file.read(4096) == _pattern(1)
        assert "Restarts:" in stats.read()
    assert mounted.stats()["Restarts"] == 1


@pytest.mark.mounted
def test_the_oom_killers_choice_is_survived(mounted: Mounted) -> None:
    """A worker in a memory cgroup that is too small for what is written."""
    root = cgroup_root()
    assert root is not None
    worker = _processes(mounted)[1]
    group = root / f"{mounted.path.parent.name}-oom"
    group.mkdir()
    try:
        v1 = group / "memory.limit_in_bytes"
        (v1 if v1.exists() else group / "memory.max").write_text(str(8 << 20))
        (group / "cgroup.procs").write_text(str(worker))
        Path(f"/proc/{worker}/oom_score_adj").write_text("1000")
        with mounted.file.open("r+b", buffering=0) as file:
            for number in range(24 << 8):
                file.write(random.Random(number).randbytes(4096))
            _new_worker(mounted, worker)
            file.seek(0)
            for number in range(24 << 8):
                assert file.read(4096) == random.Random(number).randbytes(4096)
    finally:
        _wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
    assert mounted.stats()["Restarts"] >= 1


@pytest.mark.mounted
def test_without_its_supervisor_a_worker_goes_on(mounted: Mounted) -> None:
    """Until the unmount, which ends it."""
    first, worker = _processes(mounted)
    os.kill(first, signal.SIGKILL)
    time.sleep(0.1)
    _write(mounted, _pattern(2))
    assert _read(mounted) == _pattern(2)
    done = zswapfs("restart", mounted.path)
    assert done.returncode == 1
    assert "its supervisor is gone" in done.stderr
    assert run("umount", mounted.path).returncode == 0
    _wait_for(lambda: not Path(f"/proc/{worker}").exists())


@pytest.mark.mounted
def test_who_mounts_may_ignore_its_children(place: Path) -> None:
    """Which every program that it starts inherits, and then nobody could be waited for."""
    script = 'trap \'\' CHLD; exec "$0" mount "$1" -o size=64M'
    assert run("sh", "-c", script, ZSWAPFS, place).returncode == 0
    mounted = Mounted(place)
    _write(mounted, _pattern(5))
    worker = _processes(mounted)[1]
    os.kill(worker, signal.SIGKILL)
    _new_worker(mounted, worker)
    assert _read(mounted) == _pattern(5)
    assert mounted.stats()["Restarts"] == 1


@pytest.mark.mounted
def test_a_stopped_worker_is_replaced(mount: Callable[..., Mounted]) -> None:
    """Only once a request waits: a worker without work is not missed."""
    mounted = mount(heartbeat=1)
    _write(mounted, _pattern(3))
    worker = _processes(mounted)[1]
    time.sleep(0.5)  # close() is told to the daemon later
    os.kill(worker, signal.SIGSTOP)
    time.sleep(3)
    assert _processes(mounted)[1] == worker
    began = time.monotonic()
    assert _read(mounted) == _pattern(3)
    assert 0.9 < time.monotonic() - began < 10
    assert _processes(mounted)[1] != worker
    assert mounted.stats()["Restarts"] == 1


@pytest.mark.mounted
def test_busy_and_idle_workers_are_left_alone(mount: Callable[..., Mounted]) -> None:
    """Long compactions, page I/O and nothing at all are no hangs."""
    mounted = mount(heartbeat=2)
    end = time.monotonic() + 4
    with mounted.file.open("r+b", buffering=0) as file:
        while time.monotonic() < end:
            file.seek(random.randrange(1000) * 4096)
            file.write(_pattern(4))
    time.sleep(5)
    assert mounted.stats()["Restarts"] == 0


def test_a_lane_that_does_not_move_hangs() -> None:
    """Two looks without a step, and only with a request in hand."""
    heartbeat = Heartbeat()
    assert not heartbeat.hangs((3, 4), waiting=False)
    assert not heartbeat.hangs((3, 6), waiting=False)
    assert heartbeat.hangs((3, 8), waiting=False)
    idle = Heartbeat()
    assert not any(idle.hangs((4, 8), waiting=False) for _ in range(10))
    busy = Heartbeat()
    assert not any(busy.hangs((2 * n + 1, 8), waiting=True) for n in range(10))
    slow = Heartbeat()
    assert not any(slow.hangs((n // 2 * 2 + 1,), waiting=False) for n in range(10))


def test_requests_that_nobody_takes_are_a_hang() -> None:
    """If they wait at all looks, and no lane has moved."""
    heartbeat = Heartbeat()
    assert [heartbeat.hangs((4, 8), waiting=True) for _ in range(3)] == [False, False, True]
    moving = Heartbeat()
    assert not any(moving.hangs((2 * n, 8), waiting=True) for n in range(10))
    now_and_then = Heartbeat()
    assert not any(now_and_then.hangs((4, 8), waiting=n % 2 == 0) for n in range(10))


@pytest.fixture
def strange(place: Path) -> Callable[[str], Mounted]:
    """Return what mounts with a daemon that has a fault."""

    def make(what: str) -> Mounted:
        done = mount_strange(place, what)
        assert done.returncode == 0, done.stderr
        return Mounted(place)

    return make


@pytest.mark.mounted
def test_a_mount_that_never_was_usable_is_gone(place: Path) -> None:
    """The first worker's error is the mount's, and no second one tries."""
    done = mount_strange(place, "failing_start")
    assert done.returncode == 1
    assert "nothing for 0" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not place.is_mount()


@pytest.mark.mounted
def test_requests_in_flight_come_again(strange: Callable[[str], Mounted]) -> None:
    """One that the dead worker had read, and never answered."""
    mounted = strange("hanging_statfs")
    asking = threading.Thread(target=os.statvfs, args=(mounted.path,), daemon=True)
    asking.start()
    asking.join(0.5)
    assert asking.is_alive()
    os.kill(_worker_of(mounted), signal.SIGKILL)
    asking.join(TIMEOUT)
    assert not asking.is_alive()


@pytest.mark.mounted
def test_without_resend_they_fail_and_others_do_not(strange: Callable[[str], Mounted]) -> None:
    """As before Linux 6.9."""
    mounted = strange("no_resend_and_hanging_statfs")
    _write(mounted, _pattern(6))
    failed: list[OSError] = []

    def ask() -> None:
        try:
            os.statvfs(mounted.path)
        except OSError as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(0.5)
    assert asking.is_alive()
    os.kill(_worker_of(mounted), signal.SIGKILL)
    asking.join(TIMEOUT)
    assert len(failed) == 1
    assert _read(mounted) == _pattern(6)
    assert os.statvfs(mounted.path).f_bsize == 4096


@pytest.mark.mounted
def test_a_failing_control_plane_is_replaced_and_then_done_without(
    strange: Callable[[str], Mounted],
) -> None:
    """What makes it fail comes again, so the third worker serves pages without names."""
    mounted = strange("failing_statfs")
    with mounted.file.open("r+b", buffering=0) as file:
        file.write(_pattern(8))
        with pytest.raises(OSError, match="Input/output error"):
            os.statvfs(mounted.path)
        third = _worker_of(mounted)
        file.seek(0)
        assert file.read(4096) == _pattern(8)
        with pytest.raises(OSError, match="Input/output error"):
            (mounted.path / ".stats").read_text()
        os.kill(third, signal.SIGKILL)
        _new_worker(mounted, third)
        file.seek(0)
        assert file.read(4096) == _pattern(8)


@pytest.mark.mounted
def test_workers_that_die_at_once_are_replaced_more_slowly(
    strange: Callable[[str], Mounted],
) -> None:
    """Four in a row: pauses of 0.1, 0.2, 0.4 and 0.8 s."""
    mounted = strange("dying_workers")
    _write(mounted, _pattern(9))
    time.sleep(supervisor.SETTLED_SECONDS)
    began = time.monotonic()
    os.kill(_worker_of(mounted), signal.SIGKILL)
    assert _read(mounted) == _pattern(9)
    assert 1.5 < time.monotonic() - began < 10
    assert mounted.stats()["Restarts"] == 5


@pytest.mark.mounted
def test_workers_need_no_files(strange: Callable[[str], Mounted]) -> None:
    """What is installed may be gone, or another version: it was loaded before."""
    mounted = strange("offline.files_are_gone_after_forks")
    _write(mounted, _pattern(10))
    for restarts in (1, 2):
        worker = _worker_of(mounted)
        os.kill(worker, signal.SIGKILL)
        _new_worker(mounted, worker)
        assert _read(mounted) == _pattern(10)
        assert mounted.stats()["Restarts"] == restarts
        (mounted.path / ".compact").write_text("1")


@pytest.mark.mounted
def test_a_worker_that_does_not_start_is_replaced(strange: Callable[[str], Mounted]) -> None:
    """It serves nobody, so no request of its lanes would tell."""
    mounted = strange("slow_start")
    _write(mounted, _pattern(11))
    os.kill(_worker_of(mounted), signal.SIGKILL)
    began = time.monotonic()
    assert _read(mounted) == _pattern(11)
    assert 5 < time.monotonic() - began < 30
    assert mounted.stats()["Restarts"] == 2


@pytest.mark.mounted
def test_a_supervisor_survives_its_own_errors(place: Path) -> None:
    """Nobody else would replace the worker."""
    done = mount_strange(place, "confused_supervisor", "-o", "heartbeat=1")
    assert done.returncode == 0, done.stderr
    mounted = Mounted(place)
    _write(mounted, _pattern(12))
    for restarts in (1, 2, 3):
        time.sleep(1.2)
        worker = _worker_of(mounted)
        os.kill(worker, signal.SIGKILL)
        _new_worker(mounted, worker)
        assert _read(mounted) == _pattern(12)
        assert mounted.stats()["Restarts"] == restarts


@pytest.mark.mounted
def test_without_resend_a_restart_is_refused(strange: Callable[[str], Mounted]) -> None:
    """It would fail what is under way, which may be somebody's page."""
    mounted = strange("no_resend")
    before = _processes(mounted)
    done = zswapfs("restart", mounted.path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "before Linux 6.9" in done.stderr
    assert _processes(mounted) == before


def _has_no_names(mounted: Mounted) -> bool:
    try:
        mounted.stats()
    except OSError:
        return True
    return False


@pytest.mark.mounted
def test_a_restart_brings_names_back(strange: Callable[[str], Mounted]) -> None:
    """After two control planes have failed there is none until then."""
    mounted = strange("failing_statfs")
    with pytest.raises(OSError, match="Input/output error"):
        os.statvfs(mounted.path)
    _wait_for(lambda: _has_no_names(mounted))
    done = zswapfs("restart", mounted.path)
    assert done.returncode == 0, done.stderr
    assert mounted.stats()["Restarts"] == 3


def _python_that(place: Path, does: str) -> Path:
    """Return an interpreter for a restart."""
    script = place.with_name("python")
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return script


@pytest.mark.mounted
def test_workers_are_replaced_while_a_restart_is_tried(mounted: Mounted) -> None:
    """The installed program may take its time."""
    _write(mounted, _pattern(14))
    first, worker = _processes(mounted)
    started = mounted.path.with_name("started")
    python = _python_that(mounted.path, f"touch {started}; sleep 3; echo no >&2; exit 1")
    restart_python(mounted.path).write_text(str(python))
    try:
        os.kill(first, signal.SIGHUP)
        _wait_for(started.exists)
        began = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        assert _read(mounted) == _pattern(14)
        assert time.monotonic() - began < 2
    finally:
        restart_python(mounted.path).unlink()
    assert _processes(mounted)[0] == first


@pytest.mark.mounted
def test_a_restart_right_after_a_death_is_answered(mounted: Mounted) -> None:
    """By the new program, not by the worker that becomes ready meanwhile."""
    os.kill(_worker_of(mounted), signal.SIGKILL)
    done = zswapfs("restart", mounted.path)
    assert done.returncode == 0, done.stderr
    assert "goes on with version" in done.stdout
    assert mounted.stats()["Restarts"] == 2


@pytest.mark.mounted
def test_programs_have_no_protection_of_the_daemons(mounted: Mounted) -> None:
    """What only the daemon may have is inherited, unless it is dropped."""
    first, _ = _processes(mounted)
    Path(f"/proc/{first}/oom_score_adj").write_text("500")
    found = mounted.path.with_name("found")
    python = _python_that(
        mounted.path, f"cat /proc/self/oom_score_adj >{found}.new; mv {found}.new {found}"
    )
    restart_python(mounted.path).write_text(str(python))
    try:
        os.kill(first, signal.SIGHUP)
        _wait_for(found.exists)
    finally:
        restart_python(mounted.path).unlink()
    assert found.read_text() == "0\n"


@pytest.mark.mounted
def test_a_program_that_cannot_be_run_changes_nothing(mounted: Mounted) -> None:
    """Neither one that is gone, nor one that says nothing of its version."""
    first, worker = _processes(mounted)
    for python in (Path("/nowhere/python"), _python_that(mounted.path, "exit 0")):
        restart_python(mounted.path).write_text(str(python))
        os.kill(first, signal.SIGHUP)
        time.sleep(0.5)
    restart_python(mounted.path).unlink()
    assert _processes(mounted) == (first, worker)
    assert zswapfs("restart", mounted.path).returncode == 0


@pytest.mark.mounted
def test_a_terminal_does_not_stop_the_daemon(place: Path) -> None:
    """In the foreground it gets what is typed there, which would stop or end it."""
    words = (ZSWAPFS, "mount", place, "-f", "-o", "size=64M")
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as daemon:
        mounted = Mounted(place)
        _wait_for(place.is_mount)
        assert mounted.stats()["Restarts"] == 0
        for process in _processes(mounted):
            for number in (signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN, signal.SIGQUIT):
                os.kill(process, number)
        time.sleep(0.2)
        _write(mounted, _pattern(15))
        for process in _processes(mounted):
            assert "\nState:\tT" not in Path(f"/proc/{process}/status").read_text()
        assert mounted.stats()["Restarts"] == 0
        daemon.terminate()
        assert daemon.wait(TIMEOUT) == 0


BRING_IN = """
import mmap, sys
from pathlib import Path
from zswapfs import worker

def swapped():
    return int(Path("/proc/self/status").read_text().partition("VmSwap:")[2].split()[0])

mine = [bytes([i & 255]) * 5000 for i in range(4000)]
hog = mmap.mmap(-1, 96 << 20)
for at in range(0, len(hog), 4096):
    hog[at] = 1
before = swapped()
hog.close()
worker.protect_memory(bring_in=True)
print(before, swapped())
sys.stdout.flush()
"""


@pytest.mark.swapped
def test_what_is_in_swap_comes_back_when_it_is_locked(swapped_on: Callable[..., Swapped]) -> None:
    """Or a supervisor that takes over would wait for what only the dead worker could bring."""
    swap = swapped_on("--size", "256M")
    program = swap.load(64, sys.executable, "-P", "-c", BRING_IN)
    out, _ = program.communicate(timeout=TIMEOUT)
    before, after = map(int, out.split())
    assert before > 1000
    assert after == 0


@pytest.mark.swapped
def test_restart_under_live_swap(swapped_on: Callable[..., Swapped], corpus_file: Path) -> None:
    """The same supervisor process, another program in it, another worker; nothing is lost."""
    swap = swapped_on("--size", "256M")
    load = swap.load(48, sys.executable, LOAD, corpus_file, 120, 3, 4)
    for count in range(1, 4):
        time.sleep(0.5)
        first, worker = _processes(swap)
        done = zswapfs("restart", swap.path)
        assert done.returncode == 0, done.stderr
        assert "goes on with version" in done.stdout
        assert _processes(swap)[0] == first
        assert _processes(swap)[1] != worker
        assert swap.stats()["Restarts"] == count
    os.kill(_processes(swap)[1], signal.SIGKILL)
    out, _ = load.communicate(timeout=2 * TIMEOUT)
    assert load.returncode == 0, out
    assert swap.stats()["Restarts"] == 4
    assert swap.stats()["FailedReads"] == 0
    assert zswapfs("down", swap.path).returncode == 0


@pytest.mark.mounted
def test_a_version_that_cannot_read_the_region_refuses(mounted: Mounted) -> None:
    """Before anything is touched: the same worker serves on."""
    _write(mounted, _pattern(7))
    before = _processes(mounted)
    with _region(mounted) as fd:
        geometry = os.pread(fd, 4096, 0)
        places = [found.start() + 8 for found in re.finditer(b"zswapfs\0", geometry)]
        assert len(places) == 2
        for at in places:
            os.pwrite(fd, bytes([geometry[at] + 1]), at)
        done = zswapfs("restart", mounted.path)
        for at in places:
            os.pwrite(fd, geometry[at : at + 1], at)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot go on from here" in done.stderr
    assert _processes(mounted) == before
    assert _read(mounted) == _pattern(7)
    assert mounted.stats()["Restarts"] == 0


def test_restart_of_what_is_not_mounted(tmp_path: Path) -> None:
    """One line, exit code 1."""
    done = zswapfs("restart", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


WITHOUT_CAPABILITIES = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "--")


def _is_refused(path: str) -> bool:
    """Say whether the same user without capabilities may not open what is in /proc."""
    done = run(*WITHOUT_CAPABILITIES, "sh", "-c", 'exec 3<"$0"', path)
    assert done.returncode == 0 or "Permission denied" in done.stderr, done.stderr
    return done.returncode != 0


@pytest.mark.mounted
def test_others_are_kept_out(mounted: Mounted) -> None:
    """What the worker may do, and who may look into both processes."""
    first, worker = _processes(mounted)
    status = Path(f"/proc/{worker}/status").read_text()
    words = dict(re.findall(r"^(\w+):\s*(\w+)", status, re.MULTILINE))
    assert int(words["CapEff"], 16) & ~(1 << 14) == 0
    assert int(words["CapPrm"], 16) & ~(1 << 14) == 0
    assert int(words["CapInh"], 16) == 0
    assert words["NoNewPrivs"] == "1"
    for task in Path(f"/proc/{worker}/task").iterdir():
        assert f"CapEff:\t{int(words['CapEff'], 16):016x}" in (task / "status").read_text()
    with subprocess.Popen((*WITHOUT_CAPABILITIES, "sleep", "60")) as other:
        _wait_for(lambda: "sleep" in Path(f"/proc/{other.pid}/comm").read_text())
        assert not any(_is_refused(f"/proc/{other.pid}/{name}") for name in ("mem", "maps"))
        other.kill()
    for name in ("mem", "maps"):
        assert _is_refused(f"/proc/{first}/{name}")
        assert _is_refused(f"/proc/{worker}/{name}")
    for process in (first, worker):
        assert "Max core file size        0 " in Path(f"/proc/{process}/limits").read_text()
    maps = Path(f"/proc/{worker}/maps").read_text()
    regions = re.findall(r"^\S+ (\S+) .*(?:/#\d+ \(deleted\)|memfd:zswapfs.*)$", maps, re.MULTILINE)
    assert regions
    assert set(regions) == {"rw-s"}


def _worker_of(mounted: Mounted) -> int:
    return _processes(mounted)[1]


@pytest.mark.mounted
def test_a_lane_that_has_served_a_long_request_may_rest(mount: Callable[..., Mounted]) -> None:
    """It waits for its turn to read, which on an idle mount does not come: that is no hang."""
    mounted = mount(heartbeat=1)
    with mounted.file.open("r+b", buffering=0) as file:
        file.write(os.urandom(256 << 10))
    time.sleep(3)
    assert mounted.stats()["Restarts"] == 0
