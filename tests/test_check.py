"""What ``zswapfs check`` finds: with files like the kernel's, and of real swap."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Swapped, zswapfs
from test_protect import NO_LIMIT_V1, V1, V2, make
from test_strict import may_have_resources

from zswapfs.check import (
    MISSING,
    OK,
    WARN,
    Finding,
    check_daemon,
    find_daemon,
    look,
    readable_unprivileged,
)
from zswapfs.errors import ConfigError, SetupError
from zswapfs.swap import State, Swap

LOOP = "/dev/loop3"
AREA = (1 << 14) - 1
"""Pages that can be swapped to."""
STATE = State("zswapfs-up", (LOOP,), (Swap(LOOP, AREA << 12, 0, 100),))
SUPERVISOR, WORKER = 100, 101
IO_FLUSHER = 0x40180100
ADDED = "4,77,99,-;Adding 65532k swap on {}.  Priority:100 extents:1 across:65532k {}\n"


class Machine:
    """A /proc, /sys and /dev on which all is well, to spoil."""

    def __init__(self, root: Path) -> None:
        self.root = root
        make(root, V2.format(root="/"), "0::/a", **{"a/memory.max": "max"})
        self.write("sys/fs/cgroup/cgroup.controllers", "cpu memory")
        self.write("sys/fs/cgroup/a/memory.swap.current", "0")
        self.write("sys/fs/cgroup/a/b/memory.swap.max", "1048576")
        self.write("proc/sys/kernel/osrelease", "6.9.1-amd64")
        self.write("proc/sys/vm/page-cluster", "5")
        self.write("sys/module/zswap/parameters/enabled", "N")
        self.write("proc/cpuinfo", "flags\t\t: fpu hypervisor")
        self.write("dev/cpu_dma_latency", "")
        self.write("dev/kmsg", ADDED.format(LOOP, "SSDsc"))
        self.write("sys/block/loop3/loop/dio", "1")
        self.write("sys/block/loop3/queue/logical_block_size", "4096")
        self.write("sys/block/loop3/queue/discard_max_bytes", "1048576")
        for pid, parent, name in (
            (SUPERVISOR, 1, "zswapfs"),
            (WORKER, SUPERVISOR, "zswapfs-worker"),
        ):
            self._process(pid, parent)
            self.write(f"proc/{pid}/comm", f"{name}\n")

    def _process(self, pid: int, parent: int) -> None:
        self.write(f"proc/{pid}/cmdline", "python\0-m\0zswapfs.supervisor\0/mnt/a\0005\0007\0\0")
        self.write(f"proc/{pid}/oom_score_adj", "-1000")
        self.write(f"proc/{pid}/cgroup", "0::/a")
        self.write(f"proc/{pid}/environ", "")
        (self.root / f"proc/{pid}/environ").chmod(0)
        self.write(f"proc/{pid}/mountinfo", "22 1 0:5 / /dev rw - devtmpfs devtmpfs rw")
        self.smaps(pid)
        self.status(pid, PPid=parent)
        for thread in (pid, pid + 50):
            self.write(f"proc/{pid}/task/{thread}/stat", f"1 (a) b) S 1 1 1 0 -1 {IO_FLUSHER} 0")
        self.write(f"proc/{pid}/fdinfo/6", "pos:\t0\nflags:\t02\nmnt_id:\t43\n")
        self.link(pid, "/#2 (deleted)")

    def write(self, name: str, text: str) -> None:
        """Replace a file."""
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def status(self, pid: int, **values: object) -> None:
        """Replace /proc/PID/status."""
        good = {
            "PPid": SUPERVISOR,
            "CapPrm": "0000000000004000",
            "NoNewPrivs": 1,
            "VmSwap": "      0 kB",
        }
        lines = (f"{name}:\t{value}\n" for name, value in {**good, **values}.items())
        self.write(f"proc/{pid}/status", "".join(lines))

    def smaps(self, pid: int, flags: str = "lo", name: str = "/usr/lib/x") -> None:
        """Replace what is mapped: the vDSO, 10 kB of a file, and an old kernel's vsyscall page."""
        mappings = ((8, "rd ex mr mw me de", "[vdso]"), (10, f"rd {flags} mr", name), (4, "ex", ""))
        text = "".join(
            f"7f{size:02x}-7fff r-xp 0 0:0 0   {what}\nSize:  {size} kB\nVmFlags: {words}\n"
            for size, words, what in mappings
        )
        self.write(f"proc/{pid}/smaps", text.replace("0 0   \n", "0 0   [vsyscall]\n"))

    def link(self, pid: int, target: str) -> None:
        """Replace the descriptor that is the region."""
        link = self.root / f"proc/{pid}/fd/6"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)

    def look(self, state: State = STATE) -> list[Finding]:
        """Return what check finds here."""
        return look(find_daemon(Path("/mnt/a"), self.root), state, self.root)

    def complaint(self, state: State = STATE) -> tuple[str, str, str]:
        """Return the one finding that is not well."""
        found = [finding for finding in self.look(state) if finding.state != OK]
        assert len(found) == 1, found
        return found[0].state, found[0].name, found[0].text


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return one on which all is well."""
    return Machine(tmp_path)


def test_all_is_well(machine: Machine) -> None:
    """Each protection and each setting is named once."""
    found = machine.look()
    assert {finding.state for finding in found} == {OK}
    names = [finding.name for finding in found]
    assert len(set(names)) == len(names) == 18


def test_supervisor_and_worker_are_told_apart(machine: Machine) -> None:
    """By what they are called; others' daemons are left out."""
    machine.write("proc/99/cmdline", "python\0-m\0zswapfs.supervisor\0/mnt/b\0005\0007\0\0")
    machine.status(99, PPid=1)
    machine.write("proc/98/cmdline", "grep\0zswapfs.supervisor\0")
    found = find_daemon(Path("/mnt/a"), machine.root)
    assert [(process.role, process.pid) for process in found] == [
        ("supervisor", SUPERVISOR),
        ("worker", WORKER),
    ]


def test_a_daemon_that_is_gone(machine: Machine) -> None:
    """Said which of the two."""
    (machine.root / f"proc/{WORKER}/cmdline").unlink()
    with pytest.raises(SetupError, match="/mnt/a: its worker is gone"):
        machine.look()
    machine.write(f"proc/{WORKER}/cmdline", "python\0-m\0zswapfs.supervisor\0/mnt/a\0")
    machine.write(f"proc/{SUPERVISOR}/comm", "other\n")
    with pytest.raises(SetupError, match="/mnt/a: its supervisor is gone"):
        machine.look()
    with pytest.raises(SetupError, match="/mnt/c: its daemon is gone"):
        find_daemon(Path("/mnt/c"), machine.root)


def test_what_is_not_mounted(tmp_path: Path) -> None:
    """One line."""
    with pytest.raises(ConfigError, match="no zswapfs is mounted there"):
        check_daemon(tmp_path)


@pytest.mark.parametrize("pid", [SUPERVISOR, WORKER])
def test_missing_protections_of_both(machine: Machine, pid: int) -> None:
    """Each is named, with whose it is and by how much."""
    role = "supervisor" if pid == SUPERVISOR else "worker"
    machine.smaps(pid, flags="me")
    state, name, text = machine.complaint()
    assert (state, name) == (MISSING, "memory locked")
    assert text.startswith(f"{role} 10 kB can be swapped out (")
    machine.smaps(pid)
    machine.write(f"proc/{pid}/oom_score_adj", "0")
    state, name, text = machine.complaint()
    assert (state, name) == (MISSING, "OOM killer")
    assert text.startswith(f"{role} oom_score_adj is 0; ")
    machine.write(f"proc/{pid}/oom_score_adj", "-1000")
    machine.write(f"proc/{pid}/task/{pid + 50}/stat", "1 (a) S 1 1 1 0 -1 1074266368 0")
    state, name, text = machine.complaint()
    assert (state, name) == (MISSING, "I/O flusher")
    assert text.startswith(f"{role} 1 of 2 threads are not; ")


@pytest.mark.parametrize(
    ("values", "name", "text"),
    [
        ({"CapPrm": "00000000002040ff"}, "capabilities", "worker holds 9 more than CAP_IPC_LOCK"),
        ({"NoNewPrivs": 0}, "no_new_privs", "worker can gain some"),
    ],
)
def test_missing_protections_of_the_worker(
    machine: Machine, values: dict[str, object], name: str, text: str
) -> None:
    """Of the supervisor they are not asked: it needs more."""
    machine.status(SUPERVISOR, PPid=1, **values)
    assert {finding.state for finding in machine.look()} == {OK}
    machine.status(WORKER, **values)
    found = {finding.name: finding for finding in machine.look()}
    assert found[name].state == MISSING
    assert found[name].text.startswith(f"{text}; ")


@pytest.mark.parametrize("pid", [SUPERVISOR, WORKER])
def test_locked_memory_in_swap(machine: Machine, pid: int) -> None:
    """Swapped out before it was locked."""
    machine.status(pid, PPid=1 if pid == SUPERVISOR else SUPERVISOR, VmSwap="     12 kB")
    state, name, text = machine.complaint()
    assert (state, name) == (MISSING, "memory locked")
    assert " has 12 kB in swap; " in text


def test_memory_that_is_dropped(machine: Machine) -> None:
    """It cannot be locked, and is not swapped either: no complaint."""
    machine.smaps(WORKER, flags="wr dp")
    assert {finding.state for finding in machine.look()} == {OK}


def test_a_dumpable_worker(machine: Machine) -> None:
    """What it has in memory can be read by others; with capabilities it cannot be told."""
    environ = machine.root / f"proc/{WORKER}/environ"
    environ.chmod(0o400)
    assert machine.complaint()[:2] == (MISSING, "not dumpable")
    machine.status(WORKER, CapPrm=f"{1 << 19:x}")
    found = {finding.name: finding for finding in machine.look()}
    assert "cannot be told" in found["not dumpable"].text


def test_what_cannot_be_read_is_not_hidden(machine: Machine) -> None:
    """Whatever the reason, but that it is forbidden."""
    (machine.root / f"proc/{WORKER}/environ").unlink()
    state, name, text = machine.complaint()
    assert (state, name) == (MISSING, "not dumpable")
    assert text.startswith("worker cannot be told (No such file or directory); ")


@pytest.mark.parametrize("target", ["/memfd:zswapfs (deleted)", "/var/region", "/#7 (deleted)"])
def test_a_region_that_can_be_swapped(machine: Machine, target: str) -> None:
    """A memfd, a file elsewhere, a nameless file on a filesystem that is mounted somewhere."""
    machine.write(f"proc/{WORKER}/mountinfo", "43 1 0:5 / /tmp rw - tmpfs tmpfs rw")
    machine.link(WORKER, target)
    assert machine.complaint()[:2] == (MISSING, "region")


def test_strange_names(machine: Machine) -> None:
    """Of mounts and mapped files, which may be called anything but a line's end."""
    mounts = "22 1 0:5 / /a\x0c\x0cb rw - tmpfs tmpfs rw\n23 1 0:6 / /\u2028 rw - tmpfs tmpfs rw\n"
    machine.write(f"proc/{WORKER}/mountinfo", mounts)
    machine.smaps(WORKER, name="/\x0c\x0cb")
    assert {finding.state for finding in machine.look()} == {OK}


def test_a_limited_cgroup(machine: Machine) -> None:
    """Of version 2 and of version 1; the file that limits is named."""
    machine.write("sys/fs/cgroup/a/memory.high", "1048576")
    state, name, text = machine.complaint()
    assert (state, name) == (MISSING, "memory cgroups")
    limit = f"limited by {machine.root}/sys/fs/cgroup/a/memory.high"
    assert text.startswith(f"supervisor {limit}, worker {limit}; ")
    limits = {"b/memory.limit_in_bytes": "4096", "memory.memsw.usage_in_bytes": "0"}
    limits["b/memory.memsw.limit_in_bytes"] = "8192"
    make(machine.root, V1.format(root="/"), "4:memory:/a", **limits)
    assert {finding.state for finding in machine.look()} == {OK}
    machine.write(f"proc/{WORKER}/cgroup", "4:memory:/b")
    assert machine.complaint()[:2] == (MISSING, "memory cgroups")


@pytest.mark.parametrize("pid", [SUPERVISOR, WORKER])
def test_a_session(machine: Machine, pid: int) -> None:
    """What a login ends is named."""
    machine.write(f"proc/{pid}/cgroup", "0::/user.slice/user-0.slice/session-1.scope")
    state, name, text = machine.complaint()
    assert (state, name) == (MISSING, "session")
    assert f" ends with {machine.root}/sys/fs/cgroup/user.slice; " in text


@pytest.mark.parametrize("release", ["6.8.12", "5.15.0-100-generic", "unheard of"])
def test_kernels_that_send_nothing_again(machine: Machine, release: str) -> None:
    """Before 6.9 a crash means errors."""
    machine.write("proc/sys/kernel/osrelease", release)
    assert machine.complaint()[:2] == (MISSING, "kernel")


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("sys/block/loop3/loop/dio", "0", "loop3 direct I/O"),
        ("sys/block/loop3/queue/logical_block_size", "512", "loop3 sectors"),
        ("sys/block/loop3/queue/discard_max_bytes", "0", "loop3 discard"),
        ("dev/kmsg", ADDED.format(LOOP, "SSDsc") + ADDED.format(LOOP, "SS"), "loop3 discard"),
        ("dev/kmsg", ADDED.format(LOOP, ""), "loop3 discard"),
        ("dev/kmsg", ADDED.format(LOOP, "SSDs"), "loop3 discard"),
        ("proc/sys/vm/page-cluster", "3", "page-cluster"),
        ("sys/module/zswap/parameters/enabled", "Y", "zswap"),
    ],
)
def test_settings_that_hurt(machine: Machine, file: str, text: str, name: str) -> None:
    """A warning each, which says what to do."""
    machine.write(file, text)
    assert machine.complaint()[:2] == (WARN, name)


def test_whose_discard_the_kernel_tells_of(machine: Machine) -> None:
    """Both modes of it are as good; other devices' do not matter."""
    others = ADDED.format("/dev/loop33", "SS") + ADDED.format("/dev/sda2", "SS")
    machine.write("dev/kmsg", ADDED.format(LOOP, "SSDc") + others)
    assert {finding.state for finding in machine.look()} == {OK}
    machine.write("dev/kmsg", others)
    assert machine.complaint()[:2] == (WARN, "loop3 discard")


@pytest.mark.parametrize(("pages", "tells"), [(0, False), (AREA, False), (AREA + 512, True)])
def test_discard_that_the_kernel_no_longer_tells_of(
    machine: Machine, pages: int, *, tells: bool
) -> None:
    """Freed clusters show that it is on; swapon's own, of all that there is, do not."""
    (machine.root / "dev/kmsg").unlink()
    machine.write("sys/block/loop3/loop/backing_file", "/mnt/a/swap\n")
    machine.write("mnt/a/.stats.json", json.dumps({"PagesDiscard": pages}))
    if tells:
        assert {finding.state for finding in machine.look()} == {OK}
    else:
        state, name, text = machine.complaint()
        assert (state, name) == (WARN, "loop3 discard")
        assert text.startswith("cannot be told: ")


def test_no_swap_accounting(machine: Machine) -> None:
    """Version 2 has no file in the groups, version 1 none at the top."""
    (machine.root / "sys/fs/cgroup/a/memory.swap.current").unlink()
    assert machine.complaint()[:2] == (WARN, "swap accounting")
    limits = {"memory.limit_in_bytes": str(1 << 63)}
    make(machine.root, V1.format(root="/"), "4:memory:/a", **limits)
    assert machine.complaint()[:2] == (WARN, "swap accounting")


def test_no_memory_cgroups(machine: Machine) -> None:
    """Of either version."""
    machine.write("sys/fs/cgroup/cgroup.controllers", "cpu pids")
    state, name, text = machine.complaint()
    assert (state, name) == (WARN, "swap accounting")
    assert text.startswith("no memory cgroups: ")
    machine.write("proc/self/mountinfo", "22 1 0:5 / /dev rw - devtmpfs devtmpfs rw\n")
    assert machine.complaint()[:2] == (WARN, "swap accounting")


def test_no_swap_limits(machine: Machine) -> None:
    """What version 1 calls no limit is a number."""
    machine.write("sys/fs/cgroup/a/b/memory.swap.max", "max")
    assert machine.complaint()[:2] == (WARN, "swap limits")
    files = {"memory.memsw.usage_in_bytes": "0", "memory.memsw.limit_in_bytes": NO_LIMIT_V1}
    make(machine.root, V1.format(root="/"), "4:memory:/a", **files)
    assert machine.complaint()[:2] == (WARN, "swap limits")


def test_cpus_that_sleep(machine: Machine) -> None:
    """A virtual machine has another way."""
    (machine.root / "dev/cpu_dma_latency").unlink()
    state, name, text = machine.complaint()
    assert (state, name) == (WARN, "CPU sleep")
    assert "guest_halt_poll_ns" in text
    machine.write("proc/cpuinfo", "flags\t\t: fpu")
    assert "guest_halt_poll_ns" not in machine.complaint()[2]


def test_swap_that_is_not_on(machine: Machine) -> None:
    """A mere mount has no loop device; a loop device may be without swap."""
    assert machine.complaint(State("zswapfs", (), ()))[:2] == (WARN, "swap")
    assert machine.complaint(State("zswapfs", (LOOP,), ()))[:2] == (WARN, "swap")


@pytest.fixture
def sleeper() -> Iterator[Callable[[int], int]]:
    """Return what starts a process without capabilities that is dumpable or not."""
    made = []

    def start(dumpable: int) -> int:
        code = "import ctypes, sys, time; ctypes.CDLL(None).prctl(4, int(sys.argv[1]), 0, 0, 0)"
        words = ["setpriv", "--inh-caps=-all", "--bounding-set=-all,+ipc_lock"]
        process = subprocess.Popen(
            [
                *words,
                sys.executable,
                "-c",
                f"{code}; print(flush=True); time.sleep(60)",
                str(dumpable),
            ],
            stdout=subprocess.PIPE,
        )
        made.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        return process.pid

    yield start
    for process in made:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_the_kernel_hides_what_is_not_dumpable(sleeper: Callable[[int], int]) -> None:
    """As seen by root without capabilities."""
    assert readable_unprivileged(Path(f"/proc/{sleeper(1)}/environ"))
    assert not readable_unprivileged(Path(f"/proc/{sleeper(0)}/environ"))


@pytest.mark.swapped
def test_real_swap(swapped_on: Callable[..., Swapped]) -> None:
    """What 'up' makes is as check wants it; what this machine refuses is found missing."""
    swap = swapped_on("--size", "64M")
    done = zswapfs("check", swap.path, "--json")
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert done.returncode == int(any(each["state"] == MISSING for each in found.values()))
    loop = Path(swap.device).name
    for name in (f"{loop} direct I/O", f"{loop} sectors", f"{loop} discard"):
        assert found[name]["state"] == OK, found[name]
    assert "swap" not in found
    for name in ("memory locked", "region", "capabilities", "no_new_privs", "not dumpable"):
        assert found[name]["state"] == OK, found[name]
    expected = OK if may_have_resources() else MISSING
    for name in ("I/O flusher", "OOM killer"):
        assert found[name]["state"] == expected, found[name]
    lines = zswapfs("check", swap.path).stdout.splitlines()
    assert len(lines) == len(found)
    assert lines[0].split() == [found["memory locked"][key] for key in ("state",)] + (
        f"memory locked {found['memory locked']['text']}".split()
    )
