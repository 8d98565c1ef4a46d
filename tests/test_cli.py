"""Usage and complaints that need no mount."""

import os
import sys

import pytest
from conftest import run, zswapfs

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="not root")


def test_wrong_usage_exits_2() -> None:
    """Unknown commands and flags, missing arguments."""
    for words in (["frobnicate"], ["mount"], ["up", "--sise", "1G"], ["stats", "a", "b"]):
        done = zswapfs(*words)
        assert done.returncode == 2
        assert "Usage:" in done.stderr


def test_help_and_version_exit_0() -> None:
    """Each command explains itself."""
    assert "0." in zswapfs("--version").stdout
    for command in ("up", "down", "mount", "stats", "compact", "check"):
        assert f"zswapfs {command}" in zswapfs(command, "--help").stdout


def test_stats_of_what_is_not_mounted() -> None:
    """One line, exit code 1."""
    done = zswapfs("stats", "/nonexistent")
    assert done.returncode == 1
    assert done.stderr == "zswapfs: /nonexistent: no zswapfs is mounted there\n"


@needs_root
def test_only_root_may() -> None:
    """Said before anything is tried."""
    code = "import os; from zswapfs import cli; os.setuid(65534); cli.main()"
    for words in (["up"], ["down"], ["mount", "/mnt"], ["compact"], ["check"]):
        done = run(sys.executable, "-P", "-c", code, *words)
        assert done.returncode == 1
        assert done.stderr == "zswapfs: only root may do this\n"
