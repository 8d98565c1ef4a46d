"""Run a command under a unit's restrictions, without systemd: ``sandbox.py UNIT COMMAND...``.

Those that decide whether a command works: capabilities, no_new_privs, system calls, families of
sockets, writable code, a network of its own. What a group of system calls is, systemd says.
"""

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_MDWE = 24, 38, 65
_CLONE_NEWNET = 0x40000000
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000 | errno.EPERM
_EQUAL, _AF_UNIX = 4, 1
_libc = ctypes.CDLL(None, use_errno=True)


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("how", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def directives(unit: Path) -> dict[str, list[str]]:
    """Return the words of each directive of the unit, one string for each time it is there."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def _ask_systemd(*words: str) -> list[str]:
    done = subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=True)
    lines = (line.strip() for line in done.stdout.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _expand(word: str) -> set[str]:
    """Return the system calls of a group, or the one that is named."""
    if not word.startswith("@"):
        return {word}
    _, *members = _ask_systemd("syscall-filter", word)
    return set().union(*(_expand(member) for member in members))


def allowed_calls(filters: list[str]) -> set[str]:
    """Return what is left of a list of SystemCallFilter=; the first one must allow."""
    calls: set[str] = set()
    for line in filters:
        named = set().union(*(_expand(word) for word in line.lstrip("~").split()))
        calls = calls - named if line.startswith("~") else calls | named
    return calls


def _filter_calls(calls: set[str]) -> None:
    """Let all other system calls of this process and its children fail with EPERM."""
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(_FAIL))
    is_local = _Comparison(0, _EQUAL, _AF_UNIX, 0)
    for name in calls:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue  # another architecture's
        rules = (1, ctypes.byref(is_local)) if name == "socket" else (0, None)
        if lib.seccomp_rule_add_array(context, _ALLOW, number, *rules):
            sys.exit(f"sandbox: no rule for {name}")
    if lib.seccomp_load(context):
        sys.exit("sandbox: no seccomp")


def main() -> None:
    """Do it."""
    unit = directives(Path(sys.argv[1]))
    calls = allowed_calls(unit["SystemCallFilter"])
    kept = unit["CapabilityBoundingSet"][0].lower().split()
    for line in _ask_systemd("capability")[1:]:
        name, number = line.split()
        if name not in kept:
            _libc.prctl(_PR_CAPBSET_DROP, int(number), 0, 0, 0)
    if unit["PrivateNetwork"] == ["yes"] and _libc.unshare(_CLONE_NEWNET):
        sys.exit("sandbox: no network namespace")
    if unit["RestrictNamespaces"] == ["yes"]:
        calls -= {"unshare", "setns"}
    if unit["NoNewPrivileges"] == ["yes"]:
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if unit["MemoryDenyWriteExecute"] == ["yes"]:
        _libc.prctl(_PR_SET_MDWE, 1, 0, 0, 0)
    _filter_calls(calls)
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606


if __name__ == "__main__":
    main()
