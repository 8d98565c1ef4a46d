"""Fixtures: pages to test with, a real mount, and real swap inside a memory cgroup."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
ZSWAPFS = Path(sys.executable).with_name("zswapfs")
PREFIX = "zswapfs-tests-"
"""What every mountpoint and cgroup of these tests begins with, then the process that made it:
how leftovers are found, and told from what another run is using."""
MINE = f"{PREFIX}{os.getpid()}-"
TIMEOUT = 60


def missing() -> str | None:
    """Return what this machine lacks for the mounted and swapped-on tests."""
    if os.geteuid() != 0:
        return "not root"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not Path(device).exists():
            return f"no {device}"
    if not Path("/proc/swaps").exists():
        return "a kernel without swap"
    if cgroup_root() is None:
        return "no memory cgroups"
    return None


def cgroup_root() -> Path | None:
    """Return where memory cgroups can be made: version 1 or version 2."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        if (root / "memory.limit_in_bytes").exists():
            return root
        controllers = root / "cgroup.controllers"
        if controllers.exists() and "memory" in controllers.read_text().split():
            return root
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and say why; in CI it fails instead."""
    reason = missing()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("mounted") or item.get_closest_marker("swapped"):
            if os.environ.get("CI"):
                pytest.exit(f"CI must run the mounted tests: {reason}", returncode=1)
            item.add_marker(pytest.mark.skip(reason=reason))


def run(*words: object, timeout: float = TIMEOUT) -> "subprocess.CompletedProcess[str]":
    """Run a command and return what it did, whatever that was."""
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def zswapfs(*words: object) -> "subprocess.CompletedProcess[str]":
    """Run the command line."""
    return run(ZSWAPFS, *words)


def mount_strange(mountpoint: Path, what: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Mount 64 MiB with a daemon that has a fault: the name of a function of strange.py.

    Or of another module, as ``module.function``.
    """
    module, _, name = what.rpartition(".")
    module = module or "strange"
    (mountpoint.parent / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'zswapfs.supervisor' in sys.orig_argv:\n"
        f"    sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"    import {module}\n"
        f"    {module}.{name}()\n"
    )
    environment = (f"PYTHONPATH={mountpoint.parent}", f"STRANGE={mountpoint.parent}")
    return run("env", *environment, ZSWAPFS, "mount", *words, mountpoint, "-o", "size=64M")


def mounts() -> list[tuple[bytes, bytes]]:
    """Return path and type of each mount."""
    found = []
    for line in Path("/proc/self/mounts").read_bytes().splitlines():
        words = line.split(b" ")
        path = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), words[1])
        found.append((path, words[2]))
    return found


def loops_below(folder: bytes) -> list[str]:
    """Return the loop devices on files in a folder and below, whether those still exist or not."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if entry.read_bytes().startswith(folder + b"/"):
                found.append(f"/dev/{entry.parts[3]}")
    return found


def take_down(mountpoint: Path) -> None:
    """Undo whatever there is at a mountpoint, by force where it must be."""
    for device in loops_below(os.fsencode(mountpoint)):
        run("swapoff", device)
        run("umount", device)
        run("losetup", "-d", device)
    if any(kind == b"fuse.zswapfs" and path == os.fsencode(mountpoint) for path, kind in mounts()):
        for _ in range(20):
            if run("umount", mountpoint).returncode == 0:
                return
            time.sleep(0.05)
        run("umount", "-l", mountpoint)


def _is_leftover(path: str) -> bool:
    """Say whether a path is of a run of these tests that has ended."""
    run_of = re.search(rf"/{PREFIX}(\d+)-", path)
    return run_of is not None and not Path("/proc", run_of[1]).exists()


def _refuse_dead_swap() -> None:
    """Other swap whose daemon is dead would take pages of these tests, and keep them."""
    for line in Path("/proc/swaps").read_text(errors="surrogateescape").splitlines()[1:]:
        name = Path(line.split()[0]).name
        backing = Path("/sys/block") / name / "loop/backing_file"
        if backing.exists():
            file = os.fsdecode(backing.read_bytes()).strip()
            try:
                found = run("stat", file, timeout=10).stderr.strip()
            except subprocess.TimeoutExpired:
                found = "no answer"
            if found:
                pytest.exit(f"dead swap is on: {name}, on {file} ({found})", returncode=1)


@pytest.fixture(scope="session", autouse=True)
def _clean_slate() -> None:
    """Take down what a killed run left."""
    # A shell's background jobs ignore it, and so would whatever is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = cgroup_root()
    if missing() is not None or root is None:
        return
    for mountpoint, kind in mounts():
        if kind == b"fuse.zswapfs" and _is_leftover(os.fsdecode(mountpoint)):
            take_down(Path(os.fsdecode(mountpoint)))
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):  # whose mounts are gone
        with contextlib.suppress(OSError):
            path = entry.read_bytes()
            if _is_leftover(os.fsdecode(path)):
                take_down(Path(os.fsdecode(path.rpartition(b"/")[0])))
    _refuse_dead_swap()
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _is_leftover(str(folder)):
            shutil.rmtree(folder, ignore_errors=True)
    for group in root.glob(f"{PREFIX}*"):
        if _is_leftover(str(group)):
            with contextlib.suppress(OSError):
                group.rmdir()


@pytest.fixture
def place() -> Iterator[Path]:
    """Return an empty directory to mount at; whatever is there afterwards goes."""
    folder = Path(tempfile.mkdtemp(prefix=MINE))
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    yield mountpoint
    take_down(mountpoint)
    shutil.rmtree(folder)


@dataclass
class Mounted:
    """A mount made by the real command line."""

    path: Path

    @property
    def file(self) -> Path:
        """The one big file."""
        return self.path / "swap"

    def stats(self) -> dict[str, float]:
        """Return the fields of ``.stats``."""
        found = re.findall(r"^(\w+):\t *([\d.]+)", (self.path / ".stats").read_text(), re.MULTILINE)
        return {name: float(value) for name, value in found}

    def raw(self) -> dict[str, int]:
        """Return everything that is counted."""
        return json.loads((self.path / ".stats.json").read_text())["raw"]

    def daemon(self) -> list[int]:
        """Return the processes that serve it: those that hold its /dev/fuse descriptor."""
        found = []
        for fdinfo in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.path).encode() in fdinfo.read_bytes().split(b"\0"):
                    found.append(int(fdinfo.parts[2]))
        return sorted(found)


@pytest.fixture
def mount(place: Path) -> Iterator[Callable[..., Mounted]]:
    """Return what mounts with options; fails at once where that fails."""
    folders = []

    def make(**options: object) -> Mounted:
        path = place if not folders else place.with_name(f"mnt{len(folders)}")
        path.mkdir(exist_ok=True)
        folders.append(path)
        words = ",".join(f"{name}={value}" for name, value in {"size": "64M", **options}.items())
        done = zswapfs("mount", path, "-o", words)
        assert done.returncode == 0, done.stderr
        return Mounted(path)

    yield make
    for path in folders:
        take_down(path)


@pytest.fixture
def mounted(mount: Callable[..., Mounted]) -> Mounted:
    """Return a mount of 64 MiB."""
    return mount()


@dataclass
class Swapped(Mounted):
    """Swap that is on, and memory cgroups to load it from."""

    device: str = ""
    groups: list[Path] = field(default_factory=list)

    def load(self, limit_mib: int, *words: object) -> "subprocess.Popen[str]":
        """Start a command in a new memory cgroup."""
        root = cgroup_root()
        assert root is not None
        group = root / f"{MINE}{uuid.uuid4().hex[:8]}"
        group.mkdir()
        self.groups.append(group)
        v1 = group / "memory.limit_in_bytes"
        limit = v1 if v1.exists() else group / "memory.max"
        limit.write_text(str(limit_mib << 20))
        inside = f'echo $$ >{group}/cgroup.procs && exec "$@"'
        return subprocess.Popen(
            ["sh", "-c", inside, "sh", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def swapped_on(place: Path) -> Iterator[Callable[..., Swapped]]:
    """Return what turns swap on with arguments of ``up``."""
    made: list[Swapped] = []

    def make(*words: object) -> Swapped:
        done = zswapfs("up", place, *words)
        assert done.returncode == 0, done.stderr
        device = re.search(r"/dev/loop\d+", done.stdout)
        assert device is not None
        made.append(Swapped(place, device[0]))
        return made[-1]

    yield make
    for swapped in made:
        for group in swapped.groups:
            for line in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    os.kill(int(line), 9)
    take_down(place)
    for swapped in made:
        for group in swapped.groups:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    group.rmdir()
                if not group.exists():
                    break
                time.sleep(0.05)


@pytest.fixture(scope="session")
def corpus_file() -> Path:
    """Return a file of real memory pages; made once for each checkout."""
    folder = TOP / "build" / "corpus"
    whole = folder / "all.pages"
    if not whole.exists():
        done = run(sys.executable, TOP / "contrib/corpus/make_corpus.py", folder, "--mib", 6)
        assert done.returncode == 0, done.stderr
        parts = sorted(folder.glob("*.pages"))
        whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    return whole


@pytest.fixture(scope="session")
def corpus(corpus_file: Path) -> list[bytes]:
    """Return real memory pages."""
    data = corpus_file.read_bytes()
    return [data[at : at + 4096] for at in range(0, len(data), 4096)]


@pytest.fixture
def strange(place: Path) -> Callable[[str], Mounted]:
    """Return what mounts with a daemon that has a fault."""

    def make(what: str) -> Mounted:
        done = mount_strange(place, what)
        assert done.returncode == 0, done.stderr
        return Mounted(place)

    return make
