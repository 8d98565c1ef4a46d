"""Workers that die, hang and are exchanged, under load that is verified."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TIMEOUT, ZSWAPFS, Mounted, Swapped, cgroup_root, mount_strange, run, zswapfs
from processes import new_worker, pattern, processes, read, region, wait_for, worker_of, write

from zswapfs import supervisor
from zswapfs.heartbeat import Heartbeat
from zswapfs.store import Store

LOAD = Path(__file__).with_name("load.py")


def _kill_at_random(mounted: Mounted, count: int, seed: int) -> None:
    chance = random.Random(seed)
    worker = processes(mounted)[1]
    for _ in range(count):
        time.sleep(chance.uniform(0.05, 1.5))
        os.kill(worker, signal.SIGKILL)
        worker = new_worker(mounted, worker)


@pytest.mark.swapped
def test_killed_workers_are_not_noticed_by_swap(
    swapped_on: Callable[..., Swapped], corpus_file: Path
) -> None:
    """Ten times kill -9 at random moments: no wrong byte, no task killed, no page leaked."""
    swap = swapped_on("--size", "512M")
    loads = [swap.load(64, sys.executable, LOAD, corpus_file, 160, seed, 6) for seed in (1, 2)]
    with region(swap) as fd:
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
        wait_for(lambda: swap.stats()["MemUsedTotal"] == 0)
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
    write(mounted, pattern(1))
    worker = processes(mounted)[1]
    with (mounted.path / ".stats").open() as stats, mounted.file.open("rb") as file:
        os.kill(worker, number)
        new_worker(mounted, worker)
        assert file.read(4096) == pattern(1)
        assert "Restarts:" in stats.read()
    assert mounted.stats()["Restarts"] == 1


@pytest.mark.mounted
def test_the_oom_killers_choice_is_survived(mounted: Mounted) -> None:
    """A worker in a memory cgroup that is too small for what is written."""
    root = cgroup_root()
    assert root is not None
    worker = processes(mounted)[1]
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
            new_worker(mounted, worker)
            file.seek(0)
            for number in range(24 << 8):
                assert file.read(4096) == random.Random(number).randbytes(4096)
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
    assert mounted.stats()["Restarts"] >= 1


@pytest.mark.mounted
def test_without_its_supervisor_a_worker_goes_on(mounted: Mounted) -> None:
    """Until the unmount, which ends it."""
    first, worker = processes(mounted)
    os.kill(first, signal.SIGKILL)
    time.sleep(0.1)
    write(mounted, pattern(2))
    assert read(mounted) == pattern(2)
    done = zswapfs("restart", mounted.path)
    assert done.returncode == 1
    assert "its supervisor is gone" in done.stderr
    assert run("umount", mounted.path).returncode == 0
    wait_for(lambda: not Path(f"/proc/{worker}").exists())


@pytest.mark.mounted
def test_who_mounts_may_ignore_its_children(place: Path) -> None:
    """Which every program that it starts inherits, and then nobody could be waited for."""
    script = 'trap \'\' CHLD; exec "$0" mount "$1" -o size=64M'
    assert run("sh", "-c", script, ZSWAPFS, place).returncode == 0
    mounted = Mounted(place)
    write(mounted, pattern(5))
    worker = processes(mounted)[1]
    os.kill(worker, signal.SIGKILL)
    new_worker(mounted, worker)
    assert read(mounted) == pattern(5)
    assert mounted.stats()["Restarts"] == 1


@pytest.mark.mounted
def test_a_stopped_worker_is_replaced(mount: Callable[..., Mounted]) -> None:
    """Only once a request waits: a worker without work is not missed."""
    mounted = mount(heartbeat=1)
    write(mounted, pattern(3))
    worker = processes(mounted)[1]
    time.sleep(0.5)  # close() is told to the daemon later
    os.kill(worker, signal.SIGSTOP)
    time.sleep(3)
    assert processes(mounted)[1] == worker
    began = time.monotonic()
    assert read(mounted) == pattern(3)
    assert 0.9 < time.monotonic() - began < 10
    assert processes(mounted)[1] != worker
    assert mounted.stats()["Restarts"] == 1


@pytest.mark.mounted
def test_busy_and_idle_workers_are_left_alone(mount: Callable[..., Mounted]) -> None:
    """Long compactions, page I/O and nothing at all are no hangs."""
    mounted = mount(heartbeat=2)
    end = time.monotonic() + 4
    with mounted.file.open("r+b", buffering=0) as file:
        while time.monotonic() < end:
            file.seek(random.randrange(1000) * 4096)
            file.write(pattern(4))
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
    os.kill(worker_of(mounted), signal.SIGKILL)
    asking.join(TIMEOUT)
    assert not asking.is_alive()


@pytest.mark.mounted
def test_without_resend_they_fail_and_others_do_not(strange: Callable[[str], Mounted]) -> None:
    """As before Linux 6.9."""
    mounted = strange("no_resend_and_hanging_statfs")
    write(mounted, pattern(6))
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
    os.kill(worker_of(mounted), signal.SIGKILL)
    asking.join(TIMEOUT)
    assert len(failed) == 1
    assert read(mounted) == pattern(6)
    assert os.statvfs(mounted.path).f_bsize == 4096


@pytest.mark.mounted
def test_a_failing_control_plane_is_replaced_and_then_done_without(
    strange: Callable[[str], Mounted],
) -> None:
    """What makes it fail comes again, so the third worker serves pages without names."""
    mounted = strange("failing_statfs")
    with mounted.file.open("r+b", buffering=0) as file:
        file.write(pattern(8))
        with pytest.raises(OSError, match="Input/output error"):
            os.statvfs(mounted.path)
        third = worker_of(mounted)
        file.seek(0)
        assert file.read(4096) == pattern(8)
        with pytest.raises(OSError, match="Input/output error"):
            (mounted.path / ".stats").read_text()
        os.kill(third, signal.SIGKILL)
        new_worker(mounted, third)
        file.seek(0)
        assert file.read(4096) == pattern(8)


@pytest.mark.mounted
def test_workers_that_die_at_once_are_replaced_more_slowly(
    strange: Callable[[str], Mounted],
) -> None:
    """Four in a row: pauses of 0.1, 0.2, 0.4 and 0.8 s."""
    mounted = strange("dying_workers")
    write(mounted, pattern(9))
    time.sleep(supervisor.SETTLED_SECONDS)
    began = time.monotonic()
    os.kill(worker_of(mounted), signal.SIGKILL)
    assert read(mounted) == pattern(9)
    assert 1.5 < time.monotonic() - began < 10
    assert mounted.stats()["Restarts"] == 5


@pytest.mark.mounted
def test_workers_need_no_files(strange: Callable[[str], Mounted]) -> None:
    """What is installed may be gone, or another version: it was loaded before."""
    mounted = strange("offline.files_are_gone_after_forks")
    write(mounted, pattern(10))
    for restarts in (1, 2):
        worker = worker_of(mounted)
        os.kill(worker, signal.SIGKILL)
        new_worker(mounted, worker)
        assert read(mounted) == pattern(10)
        assert mounted.stats()["Restarts"] == restarts
        (mounted.path / ".compact").write_text("1")


@pytest.mark.mounted
def test_a_worker_that_does_not_start_is_replaced(strange: Callable[[str], Mounted]) -> None:
    """It serves nobody, so no request of its lanes would tell."""
    mounted = strange("slow_start")
    write(mounted, pattern(11))
    os.kill(worker_of(mounted), signal.SIGKILL)
    began = time.monotonic()
    assert read(mounted) == pattern(11)
    assert 5 < time.monotonic() - began < 30
    assert mounted.stats()["Restarts"] == 2


@pytest.mark.mounted
def test_a_death_is_told_when_the_next_worker_serves(strange: Callable[[str], Mounted]) -> None:
    """Not before: the kernel's log takes memory, which may wait for that worker."""
    mounted = strange("late_second_worker")
    write(mounted, pattern(16))
    said = f"zswapfs: {mounted.path}: the worker ended with -9"
    os.kill(worker_of(mounted), signal.SIGKILL)
    time.sleep(0.7)
    assert said not in run("dmesg").stdout
    assert read(mounted) == pattern(16)
    wait_for(lambda: said in run("dmesg").stdout)


@pytest.mark.mounted
def test_a_supervisor_survives_its_own_errors(place: Path) -> None:
    """Nobody else would replace the worker."""
    done = mount_strange(place, "confused_supervisor", "-o", "heartbeat=1")
    assert done.returncode == 0, done.stderr
    mounted = Mounted(place)
    write(mounted, pattern(12))
    for restarts in (1, 2, 3):
        time.sleep(1.2)
        worker = worker_of(mounted)
        os.kill(worker, signal.SIGKILL)
        new_worker(mounted, worker)
        assert read(mounted) == pattern(12)
        assert mounted.stats()["Restarts"] == restarts


@pytest.mark.mounted
def test_a_terminal_does_not_stop_the_daemon(place: Path) -> None:
    """In the foreground it gets what is typed there, which would stop or end it."""
    words = (ZSWAPFS, "mount", place, "-f", "-o", "size=64M")
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as daemon:
        mounted = Mounted(place)
        wait_for(place.is_mount)
        assert mounted.stats()["Restarts"] == 0
        for process in processes(mounted):
            for number in (signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN, signal.SIGQUIT):
                os.kill(process, number)
        time.sleep(0.2)
        write(mounted, pattern(15))
        for process in processes(mounted):
            assert "\nState:\tT" not in Path(f"/proc/{process}/status").read_text()
        assert mounted.stats()["Restarts"] == 0
        daemon.terminate()
        assert daemon.wait(TIMEOUT) == 0


WITHOUT_CAPABILITIES = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "--")


def _is_refused(path: str) -> bool:
    """Say whether the same user without capabilities may not open what is in /proc."""
    done = run(*WITHOUT_CAPABILITIES, "sh", "-c", 'exec 3<"$0"', path)
    assert done.returncode == 0 or "Permission denied" in done.stderr, done.stderr
    return done.returncode != 0


@pytest.mark.mounted
def test_others_are_kept_out(mounted: Mounted) -> None:
    """What the worker may do, and who may look into both processes."""
    first, worker = processes(mounted)
    status = Path(f"/proc/{worker}/status").read_text()
    words = dict(re.findall(r"^(\w+):\s*(\w+)", status, re.MULTILINE))
    assert int(words["CapEff"], 16) & ~(1 << 14) == 0
    assert int(words["CapPrm"], 16) & ~(1 << 14) == 0
    assert int(words["CapInh"], 16) == 0
    assert words["NoNewPrivs"] == "1"
    for task in Path(f"/proc/{worker}/task").iterdir():
        assert f"CapEff:\t{int(words['CapEff'], 16):016x}" in (task / "status").read_text()
    with subprocess.Popen((*WITHOUT_CAPABILITIES, "sleep", "60")) as other:
        wait_for(lambda: "sleep" in Path(f"/proc/{other.pid}/comm").read_text())
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


@pytest.mark.mounted
def test_a_lane_that_has_served_a_long_request_may_rest(mount: Callable[..., Mounted]) -> None:
    """It waits for its turn to read, which on an idle mount does not come: that is no hang."""
    mounted = mount(heartbeat=1)
    with mounted.file.open("r+b", buffering=0) as file:
        file.write(os.urandom(256 << 10))
    time.sleep(3)
    assert mounted.stats()["Restarts"] == 0
