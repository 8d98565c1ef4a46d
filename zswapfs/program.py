"""Programs that a supervisor runs beside its own work."""

import ctypes
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_PR_SET_IO_FLUSHER = 57
_SAID_BYTES = 4096
_libc = ctypes.CDLL(None)


def _drop_protection() -> None:
    """Be as anybody else: what only the daemon may have is inherited, and then by its tools.

    An I/O flusher's allocations do not swap anything out, so that a swapoff among them would have
    pages come back to where there is no room for them.
    """
    _libc.prctl(_PR_SET_IO_FLUSHER, 0, 0, 0, 0)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0")


def _execute(words: list[str], says: int, keep: tuple[int, ...]) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        _drop_protection()
        os.dup2(says, 2)
        for fd in keep:
            os.set_inheritable(fd, True)  # noqa: FBT003
        os.execv(words[0], words)  # noqa: S606
    except BaseException as error:  # noqa: BLE001 the last chance to say anything
        os.write(2, f"{words[0]}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(127)


class Program:
    """One that runs; nobody waits for it, not even for its start, which may need a slow disk.

    ``fd`` is readable when it has ended.
    """

    def __init__(self, words: list[str], *, keep: tuple[int, ...] = (), seconds: float) -> None:
        """Run ``words`` with the descriptors ``keep``; it is late after ``seconds``.

        Raises OSError.
        """
        self._said_fd, says = os.pipe()
        os.set_blocking(self._said_fd, False)
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _execute(words, says, keep)
            self.fd = os.pidfd_open(self._pid)
        except OSError:
            os.close(self._said_fd)
            raise
        finally:
            os.close(says)
        self.late_at: float | None = time.monotonic() + seconds

    def is_late(self) -> bool:
        """Say whether it has had its time."""
        return self.late_at is not None and time.monotonic() >= self.late_at

    def kill(self) -> None:
        """End it. Where it is stuck, nobody waits for that."""
        self.late_at = None
        os.kill(self._pid, signal.SIGKILL)

    def close(self) -> tuple[int, str]:
        """Return exit code and last line of complaint of what has ended."""
        _, status = os.waitpid(self._pid, 0)
        said = b""
        with suppress(BlockingIOError):  # what it has started has the pipe, too
            said = os.read(self._said_fd, _SAID_BYTES)
        os.close(self._said_fd)
        os.close(self.fd)
        lines = said.decode(errors="surrogateescape").strip().splitlines()
        return os.waitstatus_to_exitcode(status), lines[-1] if lines else ""
