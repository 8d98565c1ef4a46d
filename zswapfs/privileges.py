"""What a worker gives up before it parses requests."""

import ctypes
import os
import resource
from pathlib import Path

_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
CAP_IPC_LOCK = 14
"""Locked memory needs it: threads' stacks and buffers come into being after the lock."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def _must(rv: int) -> None:
    if rv:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def keep_out_others() -> None:
    """Make memory unreadable for other processes: no ptrace, no core. Raises OSError.

    Root's CAP_SYS_PTRACE still may.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _must(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def give_up_capabilities() -> None:
    """Keep CAP_IPC_LOCK alone, if it is there, and never get another. Raises OSError.

    Of the calling thread: call it before there are others.
    """
    _must(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    for number in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        # Fails where CAP_SETPCAP is missing; without new privileges the set is of no use then.
        _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = _Header(_CAPABILITY_VERSION_3, 0)
    sets = (_Set * 2)()
    _must(_libc.capget(ctypes.byref(header), sets))
    kept = sets[0].permitted & 1 << CAP_IPC_LOCK
    sets[0] = _Set(kept, kept, 0)
    sets[1] = _Set(0, 0, 0)
    _must(_libc.capset(ctypes.byref(header), sets))
