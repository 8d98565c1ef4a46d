"""Programs that a supervisor runs beside its own work."""

import os
import signal
import time
from contextlib import suppress
from typing import NoReturn


def _execute(words: list[str], says: int, keep: tuple[int, ...]) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
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

    ``fd`` is readable when it has said something on standard error, or has ended.
    """

    def __init__(self, words: list[str], *, keep: tuple[int, ...] = (), seconds: float) -> None:
        """Run ``words`` with the descriptors ``keep``; it is late after ``seconds``.

        Raises OSError.
        """
        self.fd, says = os.pipe()
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _execute(words, says, keep)
        except OSError:
            os.close(self.fd)
            raise
        finally:
            os.close(says)
        self.late_at: float | None = time.monotonic() + seconds
        self._said = b""

    def has_ended(self) -> bool:
        """Take what it says, when ``fd`` is readable; say whether it was the last."""
        more = os.read(self.fd, 4096)
        self._said = (self._said + more)[-4096:]
        return not more

    def is_late(self) -> bool:
        """Say whether it has had its time."""
        return self.late_at is not None and time.monotonic() >= self.late_at

    def kill(self) -> None:
        """End it. Where it is stuck, nobody waits for that."""
        self.late_at = None
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def close(self) -> tuple[int, str]:
        """Return exit code and last line of complaint of what has ended."""
        os.close(self.fd)
        _, status = os.waitpid(self._pid, 0)
        lines = self._said.decode(errors="surrogateescape").strip().splitlines()
        return os.waitstatus_to_exitcode(status), lines[-1] if lines else ""
