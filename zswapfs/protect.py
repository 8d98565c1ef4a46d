"""Memory cgroups with a limit, and the way out of them.

A daemon that serves swap must not be throttled for memory that only it can free: in a limited
cgroup its own allocations go into reclaim, which swaps out, which waits for the daemon.

Version 1 and version 2 of cgroups, whichever is mounted, or both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LIMITS = ("memory.limit_in_bytes", "memory.max", "memory.high")
_UNLIMITED = 1 << 62
"""What version 1 calls no limit is a little less than 2^63, depending on the page size."""


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cgroup hierarchy that can limit memory."""

    mount: Path
    root: str
    """Of the hierarchy, what is mounted there; '/' but in containers."""
    controller: str
    """As /proc/PID/cgroup names it: 'memory', or nothing for version 2."""

    def group_of(self, cgroup: str) -> Path:
        """Return the directory of the process whose /proc/PID/cgroup this is."""
        for line in filter(None, cgroup.split("\n")):
            _, controllers, path = line.split(":", 2)
            if self.controller not in controllers.split(","):
                continue
            if self.root != "/":
                inside = path == self.root or path.startswith(f"{self.root}/")
                path = path.removeprefix(self.root) if inside else "/"
            # Outside of what can be seen here: what can be seen is above it.
            return self.mount if path.startswith("/..") else self.mount / path.lstrip("/")
        return self.mount

    def limits_of(self, group: Path) -> list[Path]:
        """Return the files with a limit that holds for a cgroup: its own first, then those above.

        A cgroup that is gone has none of its own.
        """
        found = []
        while True:
            found += [group / name for name in _LIMITS if _has_limit(group / name)]
            if group == self.mount:
                return found
            group = group.parent


def _has_limit(file: Path) -> bool:
    try:
        text = file.read_text().strip()
    except OSError:
        return False
    return text != "max" and int(text) < _UNLIMITED


def hierarchies(root: Path) -> Iterator[Hierarchy]:
    """Return the mounted hierarchies; ``root`` is where /proc and /sys are."""
    seen = set()
    text = (root / "proc/self/mountinfo").read_bytes().decode(errors="surrogateescape")
    for line in text.split("\n")[:-1]:
        place, _, kind = line.partition(" - ")
        top, mount = place.split(" ")[3:5]
        fstype, _, options = kind.split(" ", 2)
        is_v1 = fstype == "cgroup" and "memory" in options.split(",")
        if fstype in seen or not (is_v1 or fstype == "cgroup2"):
            continue
        seen.add(fstype)
        yield Hierarchy(root / mount.lstrip("/"), top, "memory" if is_v1 else "")


def memory_limits(pid: int | str, root: Path = Path("/")) -> list[Path]:
    """Return the files with a memory limit that holds for a process. Raises OSError."""
    cgroup = (root / "proc" / str(pid) / "cgroup").read_text(errors="surrogateescape")
    return [limit for tree in hierarchies(root) for limit in tree.limits_of(tree.group_of(cgroup))]


def leave_limited_cgroup(root: Path = Path("/")) -> list[str]:
    """Move this process to the root of each hierarchy in which a memory limit holds for it.

    Pages that it was charged for stay charged there, so do it before taking memory. Where no
    limit holds, nothing is changed: a service's cgroup is how its manager knows it.
    Returns what could not be had.
    """
    missing = []
    try:
        cgroup = (root / "proc/self/cgroup").read_text(errors="surrogateescape")
        trees = list(hierarchies(root))
    except OSError as error:
        return [f"memory cgroups cannot be looked at ({error.strerror})"]
    for tree in trees:
        group = tree.group_of(cgroup)
        above = tree.limits_of(tree.mount)
        if above:  # a container's own: nothing is above it that could be seen
            missing.append(f"in a limited memory cgroup ({above[0]})")
        elif limits := tree.limits_of(group):
            try:
                (tree.mount / "cgroup.procs").write_text("0")  # who writes it
            except OSError as error:
                missing.append(f"in a limited memory cgroup ({limits[0]}: {error.strerror})")
    return missing
