"""The one setting of the system that pays: vm.page-cluster, how many pages a fault brings in.

``up --tune`` raises it, and ``down`` puts the old value back. What was there before, and for which
mountpoints it was raised, is in a file under /run, so that a killed ``up`` is mended by the next
``down``; whatever somebody else has set meanwhile stays.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .config import RUN_FOLDER
from .errors import SetupError

PAGE_CLUSTER = 5
"""2^5 pages. Sequential swap-in 23, 53 and 62 thousand pages/s at 0, 3 and 5; random the same."""


@dataclass
class _State:
    before: int = 0
    mountpoints: list[str] = field(default_factory=list)


class PageCluster:
    """vm.page-cluster, and who has raised it."""

    def __init__(
        self,
        sysctl: Path = Path("/proc/sys/vm/page-cluster"),
        file: Path = RUN_FOLDER / "page-cluster",
    ) -> None:
        self._sysctl = sysctl
        self._file = file

    def value(self) -> int:
        """Return what it is now."""
        return int(self._sysctl.read_text())

    def is_low(self) -> bool:
        """Say whether more would pay."""
        return self.value() < PAGE_CLUSTER

    def raise_for(self, mountpoint: Path) -> None:
        """Raise it, if it is low, until the last mountpoint that asked for it gives it up.

        Raises SetupError where that is not allowed.
        """
        with self._locked() as state:
            if not state.mountpoints:
                if not self.is_low():
                    return
                state.before = self.value()
            if str(mountpoint) not in state.mountpoints:
                state.mountpoints.append(str(mountpoint))
            self._keep(state)  # first: whoever is killed in between is put right by give_up()
            try:
                if self.is_low():
                    self._sysctl.write_text(str(PAGE_CLUSTER))
            except OSError as error:
                state.mountpoints.remove(str(mountpoint))
                self._keep(state)
                raise SetupError(f"{self._sysctl}: {error.strerror}") from None

    def give_up(self, mountpoint: Path) -> None:
        """Put the old value back, if nobody else needs the new one or has set another."""
        with self._locked() as state:
            if str(mountpoint) not in state.mountpoints:
                return
            state.mountpoints.remove(str(mountpoint))
            if not state.mountpoints and self.value() == PAGE_CLUSTER:
                self._sysctl.write_text(str(state.before))
            self._keep(state)

    @contextmanager
    def _locked(self) -> Iterator[_State]:
        self._file.parent.mkdir(mode=0o700, exist_ok=True)
        with self._file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = _State()
            with suppress(OSError, ValueError, TypeError):
                state = _State(**json.loads(self._file.read_text()))
            yield state

    def _keep(self, state: _State) -> None:
        if not state.mountpoints:
            self._file.unlink(missing_ok=True)
            return
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(vars(state)))
        new.replace(self._file)
