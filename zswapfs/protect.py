"""Cgroups that a daemon must not be in, and the way out of them.

A daemon that serves swap must not be throttled for memory that only it can free: in a limited
cgroup its own allocations go into reclaim, which swaps out, which waits for the daemon. Nor may
it end with the login that it was started from: at logout and at shutdown systemd kills what is in
the cgroup of a session, and swap would still be on.

Version 1 and version 2 of cgroups, whichever is mounted, or both.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LIMITS = ("memory.limit_in_bytes", "memory.max", "memory.high")
_UNLIMITED = 1 << 62
"""What version 1 calls no limit is a little less than 2^63, depending on the page size."""
_VERSION_2, _MEMORY, _SYSTEMD = "", "memory", "name=systemd"
"""Hierarchies, as /proc/PID/cgroup names them; the last two are of version 1."""


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cgroup hierarchy that can limit memory, or that systemd knows processes by."""

    mount: Path
    root: str
    """Of the hierarchy, what is mounted there; '/' but in containers."""
    controller: str
    """As /proc/PID/cgroup names it: 'memory', 'name=systemd', or nothing for version 2."""

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
            found += [group / name for name in _LIMITS if has_limit(group / name)]
            if group == self.mount:
                return found
            group = group.parent

    def session_of(self, group: Path) -> Path | None:
        """Return the cgroup, this one or above it, whose processes end with a login, if any.

        A scope is what a session is, and whatever else was started from outside of systemd;
        services of a user's own manager end with it. A system service is neither.
        """
        if self.controller == _MEMORY:
            return None  # there systemd only follows its other hierarchies
        above = self.mount
        for name in group.relative_to(self.mount).parts:
            above /= name
            if name == "user.slice" or name.endswith(".scope"):
                return above
        return None


def has_limit(file: Path) -> bool:
    """Say whether there is such a file of a cgroup, and it limits something."""
    try:
        text = file.read_text().strip()
    except OSError:
        return False
    return text != "max" and int(text) < _UNLIMITED


def _controller(fstype: str, options: list[str]) -> str | None:
    if fstype == "cgroup2":
        return _VERSION_2
    names = (_MEMORY, _SYSTEMD) if fstype == "cgroup" else ()
    return next((name for name in names if name in options), None)


def hierarchies(root: Path) -> Iterator[Hierarchy]:
    """Return the mounted hierarchies; ``root`` is where /proc and /sys are."""
    seen = set()
    text = (root / "proc/self/mountinfo").read_bytes().decode(errors="surrogateescape")
    for line in text.split("\n")[:-1]:
        place, _, kind = line.partition(" - ")
        top, mount = place.split(" ")[3:5]
        fstype, _, options = kind.split(" ", 2)
        controller = _controller(fstype, options.split(","))
        if controller is None or controller in seen:
            continue
        seen.add(controller)
        yield Hierarchy(root / mount.lstrip("/"), top, controller)


def cgroups_below(root: Path) -> Iterator[Path]:
    """Return ``root`` and the cgroups below it, each after the one above it.

    What vanishes meanwhile is left out: services come and go at any moment.
    """
    for folder, names, _ in os.walk(root):
        names.sort()
        yield Path(folder)


def _cgroup_of(pid: int | str, root: Path) -> str:
    return (root / "proc" / str(pid) / "cgroup").read_text(errors="surrogateescape")


def memory_limits(pid: int | str, root: Path = Path("/")) -> list[Path]:
    """Return the files with a memory limit that holds for a process. Raises OSError."""
    cgroup = _cgroup_of(pid, root)
    return [limit for tree in hierarchies(root) for limit in tree.limits_of(tree.group_of(cgroup))]


def sessions(pid: int | str, root: Path = Path("/")) -> list[Path]:
    """Return the cgroups that a process is in and that end with a login. Raises OSError."""
    cgroup = _cgroup_of(pid, root)
    found = [tree.session_of(tree.group_of(cgroup)) for tree in hierarchies(root)]
    return [group for group in found if group]


def leave_harmful_cgroups(root: Path = Path("/")) -> list[str]:
    """Move this process to the root of each hierarchy in which it is limited, or in a session.

    Pages that it was charged for stay charged there, so do it before taking memory. Elsewhere
    nothing is changed: a service's cgroup is how its manager knows it.
    Returns what could not be had.
    """
    try:
        cgroup = _cgroup_of("self", root)
        trees = list(hierarchies(root))
    except OSError as error:
        return [f"cgroups cannot be looked at ({error.strerror})"]
    return [text for tree in trees for text in _leave(tree, tree.group_of(cgroup))]


def _leave(tree: Hierarchy, group: Path) -> list[str]:
    """Move to the root if the cgroup is harmful; return what is harmful even so."""
    above = tree.limits_of(tree.mount)[:1]
    # A container's own: nothing is above it that could be seen.
    missing = [f"in a limited memory cgroup ({limit})" for limit in above]
    limits = [] if above else tree.limits_of(group)[:1]
    session = tree.session_of(group)
    harmful = [f"in a limited memory cgroup ({limit}" for limit in limits]
    harmful += [f"in a session's cgroup ({session}"] if session else []
    if harmful:
        try:
            (tree.mount / "cgroup.procs").write_text("0")  # who writes it
        except OSError as error:
            missing += [f"{text}: {error.strerror})" for text in harmful]
    return missing
