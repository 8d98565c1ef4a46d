"""Out of limited memory cgroups and sessions: with files like the kernel's, and the kernel's."""

import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MINE, ZSWAPFS, Mounted, cgroup_root, run

from zswapfs.protect import hierarchies, leave_harmful_cgroups, memory_limits, sessions

V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V1_SYSTEMD = "40 31 0:37 {root} /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd"
V2 = "41 31 0:38 {root} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw"
OTHERS = "22 1 0:5 / /dev rw - devtmpfs devtmpfs rw\n34 31 0:31 / /cpu rw - cgroup cgroup rw,cpu\n"
NO_LIMIT_V1 = "9223372036854771712"


def make(root: Path, mount: str, cgroup: str, **limits: str) -> None:
    """Make what the kernel shows of one process: ``limits`` are files below the hierarchy."""
    own = root / "proc/self"
    own.mkdir(parents=True, exist_ok=True)
    (own / "mountinfo").write_text(f"{OTHERS}{mount}\n")
    (own / "cgroup").write_text(f"3:cpu:/limited\n{cgroup}\n")
    top = root / mount.split()[4].lstrip("/")
    top.mkdir(parents=True, exist_ok=True)
    (top / "cgroup.procs").write_text("")
    for name, value in limits.items():
        file = top / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")


@pytest.mark.parametrize(
    "name", ["a.slice/b/memory.max", "a.slice/memory.max", "a.slice/memory.high"]
)
def test_a_limit_of_version_2_is_left(tmp_path: Path, name: str) -> None:
    """Its own or of the one above; a soft limit throttles, so it counts."""
    unlimited = {"a.slice/memory.max": "max", "a.slice/b/memory.high": "max"}
    make(tmp_path, V2.format(root="/"), "0::/a.slice/b", **{**unlimited, name: "1048576"})
    assert memory_limits("self", tmp_path) == [tmp_path / "sys/fs/cgroup" / name]
    assert leave_harmful_cgroups(tmp_path) == []
    assert (tmp_path / "sys/fs/cgroup/cgroup.procs").read_text() == "0"


def test_a_limit_of_version_1_is_left(tmp_path: Path) -> None:
    """The memory hierarchy's; the CPU's is nobody's business."""
    limits = {"a/memory.limit_in_bytes": "1048576", "memory.limit_in_bytes": NO_LIMIT_V1}
    make(tmp_path, V1.format(root="/"), "4:memory:/a", **limits)
    assert leave_harmful_cgroups(tmp_path) == []
    assert (tmp_path / "sys/fs/cgroup/memory/cgroup.procs").read_text() == "0"


@pytest.mark.parametrize(
    ("mount", "cgroup", "limits"),
    [
        (V2, "0::/a", {"a/memory.max": "max", "a/memory.high": "max", "b/memory.max": "4096"}),
        (V2, "0::/", {"b/memory.max": "4096"}),
        (V2, "0::/gone", {"b/memory.max": "4096"}),
        (V1, "4:memory:/a", {"a/memory.limit_in_bytes": NO_LIMIT_V1}),
        (V1, "4:memory:/user.slice", {"user.slice/memory.limit_in_bytes": NO_LIMIT_V1}),
        (V2, "0::/system.slice/zswapfs.service", {}),
        (V2, "0::/user.slices/my.scope.service", {}),
        (V1_SYSTEMD, "1:name=systemd:/system.slice/zswapfs.service", {}),
    ],
)
def test_without_a_limit_nothing_changes(
    tmp_path: Path, mount: str, cgroup: str, limits: dict[str, str]
) -> None:
    """A service stays where its manager put it; others' limits do not matter."""
    make(tmp_path, mount.format(root="/"), cgroup, **limits)
    assert leave_harmful_cgroups(tmp_path) == []
    assert (tmp_path / "sys/fs/cgroup").is_dir()
    assert {file.read_text() for file in tmp_path.rglob("cgroup.procs")} == {""}


@pytest.mark.parametrize(
    ("cgroup", "session"),
    [
        ("/user.slice/user-0.slice/session-3.scope", "user.slice"),
        ("/user.slice/user-0.slice/user@0.service/app.slice/a.service", "user.slice"),
        ("/system.slice/run-r12.scope/b", "system.slice/run-r12.scope"),
    ],
)
@pytest.mark.parametrize(("mount", "name"), [(V2, "0::"), (V1_SYSTEMD, "1:name=systemd:")])
def test_a_session_is_left(
    tmp_path: Path, mount: str, name: str, cgroup: str, session: str
) -> None:
    """Whatever ends with a login or a user's manager, in what systemd knows processes by."""
    make(tmp_path, mount.format(root="/"), f"{name}{cgroup}")
    top = tmp_path / mount.split()[4].lstrip("/")
    assert sessions("self", tmp_path) == [top / session]
    assert leave_harmful_cgroups(tmp_path) == []
    assert (top / "cgroup.procs").read_text() == "0"


def test_a_container_is_no_session(tmp_path: Path) -> None:
    """What is above the root that it sees is its own scope."""
    make(tmp_path, V2.format(root="/a.slice/b.scope"), "0::/a.slice/b.scope/c")
    assert leave_harmful_cgroups(tmp_path) == []
    assert (tmp_path / "sys/fs/cgroup/cgroup.procs").read_text() == ""


def test_what_is_not_permitted_is_told(tmp_path: Path) -> None:
    """Named by the file that limits, and by the cgroup that ends."""
    make(tmp_path, V2.format(root="/"), "0::/a/b.scope", **{"a/memory.max": "4096"})
    (tmp_path / "sys/fs/cgroup/cgroup.procs").unlink()
    (tmp_path / "sys/fs/cgroup/cgroup.procs").mkdir()
    limit = tmp_path / "sys/fs/cgroup/a/memory.max"
    assert leave_harmful_cgroups(tmp_path) == [
        f"in a limited memory cgroup ({limit}: Is a directory)",
        f"in a session's cgroup ({limit.parent}/b.scope: Is a directory)",
    ]


def test_a_container_cannot_be_left(tmp_path: Path) -> None:
    """Where the root that it sees is limited: said, and nothing is tried."""
    make(tmp_path, V2.format(root="/docker/1"), "0::/docker/1/a", **{"memory.max": "4096"})
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    assert leave_harmful_cgroups(tmp_path) == [f"in a limited memory cgroup ({limit})"]
    assert (tmp_path / "sys/fs/cgroup/cgroup.procs").read_text() == ""


def test_a_part_of_the_hierarchy_is_mounted(tmp_path: Path) -> None:
    """Paths are found below what is mounted; what is outside of it is at its top."""
    make(tmp_path, V2.format(root="/docker/1"), "0::/docker/1/a", **{"a/memory.max": "4096"})
    assert memory_limits("self", tmp_path) == [tmp_path / "sys/fs/cgroup/a/memory.max"]
    for outside in ("0::/docker/10/a", "0::/../a"):
        (tmp_path / "proc/self/cgroup").write_text(outside)
        assert memory_limits("self", tmp_path) == []


def test_strange_names(tmp_path: Path) -> None:
    """Cgroups may be called anything but a line's end."""
    name = "a:\x0cb\u2028\udcff c"
    make(tmp_path, V2.format(root="/"), "0::/x", **{f"{name}/memory.max": "4096"})
    text = f"0::/{name}\n".encode(errors="surrogateescape")
    (tmp_path / "proc/self/cgroup").write_bytes(text)
    assert memory_limits("self", tmp_path) == [tmp_path / "sys/fs/cgroup" / name / "memory.max"]


def test_without_cgroups(tmp_path: Path) -> None:
    """No hierarchy, no limit; no /proc, and it says so."""
    assert leave_harmful_cgroups(tmp_path) == [
        "cgroups cannot be looked at (No such file or directory)"
    ]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(OTHERS)
    (tmp_path / "proc/self/cgroup").write_text("")
    assert leave_harmful_cgroups(tmp_path) == []


@contextlib.contextmanager
def _cgroup(root: Path, kind: str = "") -> Iterator[Path]:
    group = root / f"{MINE}{uuid.uuid4().hex[:8]}{kind}"
    group.mkdir()
    yield group
    for _ in range(100):  # until the daemon has ended
        with contextlib.suppress(OSError):
            group.rmdir()
        if not group.exists():
            break
        time.sleep(0.05)


def _is_left(place: Path, group: Path) -> None:
    """Mount from inside of a cgroup: both processes leave it, what started them stays."""
    inside = f'echo $$ >{group}/cgroup.procs && "$@" && cat /proc/$$/cgroup'
    done = run("sh", "-c", inside, "sh", ZSWAPFS, "mount", place, "-o", "size=64M")
    assert done.returncode == 0, done.stderr
    assert group.name in done.stdout
    daemon = Mounted(place).daemon()
    assert len(daemon) == 2
    for process in daemon:
        assert memory_limits(process) == []
        assert sessions(process) == []
        assert group.name not in Path(f"/proc/{process}/cgroup").read_text()
    assert run("umount", place).returncode == 0


@pytest.mark.mounted
def test_a_daemon_leaves_the_limited_cgroup_it_was_started_in(place: Path) -> None:
    """Of whichever version limits memory here."""
    root = cgroup_root()
    assert root is not None
    with _cgroup(root) as group:
        v1 = group / "memory.limit_in_bytes"
        (v1 if v1.exists() else group / "memory.max").write_text(str(256 << 20))
        _is_left(place, group)


@pytest.mark.mounted
def test_a_daemon_leaves_the_session_it_was_started_in(place: Path) -> None:
    """In each hierarchy that systemd may know it by."""
    trees = [tree for tree in hierarchies(Path("/")) if tree.controller != "memory"]
    if not trees:
        pytest.skip("no cgroups that systemd would use")
    for tree in trees:
        with _cgroup(tree.mount, ".scope") as group:
            _is_left(place, group)
