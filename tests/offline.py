"""A fault for the daemon, like those of strange.py, but nothing of zswapfs is loaded here."""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Gone:
    """Finds nothing, and nobody after it does."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        raise ImportError(f"{name} is gone")


def files_are_gone_after_forks() -> None:
    """Let no module be loaded in a forked process."""
    os.register_at_fork(after_in_child=lambda: sys.meta_path.insert(0, _Gone()))
