"""The commands. One line of complaint and exit code 1; wrong usage exits 2."""

import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click

from . import swap
from .check import MISSING, check_daemon, find_processes
from .config import DEFAULT_MOUNTPOINT, Options, parse_count, parse_options
from .errors import ConfigError, SetupError, ZswapfsError
from .mount import (
    SIGNALS,
    Mount,
    mount_fuse,
    mount_source,
    restart_fifo,
    restart_python,
    unmount,
)
from .tune import PAGE_CLUSTER, PageCluster

READY_TIMEOUT = 30
"""Seconds that a mount may take to become usable."""
UNMOUNT_SECONDS = 2
MAX_PRIORITY = 32767
PROGRESS_SECONDS = 0.2

_MOUNTPOINT = click.argument(
    "mountpoint", type=click.Path(path_type=Path), default=DEFAULT_MOUNTPOINT
)
_OPTION_WORDS = click.option(
    "-o", "words", metavar="NAME=VALUE,...", multiple=True, help="Mount options, as README lists."
)

_STRICT = click.option(
    "--strict", is_flag=True, help="Only with every protection; else say what is missing."
)


def _need_root() -> None:
    if os.geteuid() != 0:
        raise ConfigError("only root may do this")


def _absolute(mountpoint: Path) -> Path:
    return Path(os.path.realpath(mountpoint))


def _check_mountpoint(mountpoint: Path) -> None:
    if mount_source(mountpoint) is not None:
        raise ConfigError(f"{mountpoint}: a zswapfs is mounted there already")
    if not mountpoint.exists():
        raise ConfigError(f"{mountpoint}: no such directory")
    if not mountpoint.is_dir():
        raise ConfigError(f"{mountpoint}: not a directory")
    if any(mountpoint.iterdir()):
        raise ConfigError(f"{mountpoint}: not empty")


def _wait_ready(fd: int, mountpoint: Path) -> list[str]:
    """Return what the daemon says, once it is usable. Raises SetupError when it will not be."""
    text = ""
    end = time.monotonic() + READY_TIMEOUT
    while "ready\n" not in text:
        if not select.select([fd], [], [], max(0, end - time.monotonic()))[0]:
            raise SetupError(f"{mountpoint}: not usable after {READY_TIMEOUT} s")
        more = os.read(fd, 4096)
        if not more:
            reasons = _said(text.splitlines(), "error")
            raise SetupError(f"{mountpoint}: {reasons[-1] if reasons else 'the daemon ended'}")
        text += more.decode(errors="replace")
    return text.splitlines()


def _said(lines: list[str], kind: str) -> list[str]:
    return [line.removeprefix(f"{kind}: ") for line in lines if line.startswith(f"{kind}: ")]


def _start_daemon(mountpoint: Path, options: Options, fuse_fd: int) -> int:
    """Start the daemon, with no other descriptor of ours; return where it says what it became."""
    ready, says = os.pipe()
    # It complains where the system's log is; without one, nowhere.
    kmsg = Path("/dev/kmsg")
    with (kmsg if os.access(kmsg, os.W_OK) else Path(os.devnull)).open("wb") as log:
        subprocess.Popen(
            Mount(mountpoint, options, fuse_fd).command(says),
            pass_fds=(fuse_fd, says),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    os.close(says)
    os.close(fuse_fd)
    return ready


def _mount(mountpoint: Path, options: Options, source: str) -> list[str]:
    """Mount and leave a daemon behind; return its notes. Nothing is left after an error."""
    _check_mountpoint(mountpoint)
    # The daemon begins with them blocked, until it can handle them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    fuse_fd = mount_fuse(mountpoint, source)
    try:
        with os.fdopen(_start_daemon(mountpoint, options, fuse_fd), "rb") as ready:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            notes = _said(_wait_ready(ready.fileno(), mountpoint), "note")
        (mountpoint / "swap").stat()
    except BaseException:  # interrupted, too
        with suppress(OSError):
            unmount(mountpoint, lazily=True)
        raise
    return notes


def _unmount(mountpoint: Path) -> None:
    """Unmount; whoever looks at the mount for a moment does not matter."""
    end = time.monotonic() + UNMOUNT_SECONDS
    while True:
        try:
            unmount(mountpoint)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise SetupError(f"{mountpoint}: {error.strerror}") from None
        else:
            return
        time.sleep(0.05)


def _read_json(mountpoint: Path) -> str:
    try:
        return (mountpoint / ".stats.json").read_text()
    except OSError as error:
        if mount_source(mountpoint) is None:
            raise ConfigError(f"{mountpoint}: no zswapfs is mounted there") from None
        raise SetupError(f"{mountpoint}: {error.strerror}") from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="zswapfs")
def cli() -> None:
    """Compressed swap in user space that gives freed memory back."""


@cli.command("mount")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@_OPTION_WORDS
@_STRICT
@click.option("-f", "foreground", is_flag=True, help="Stay in the foreground.")
@click.option("--source", default=swap.SOURCE_MOUNT, hidden=True)
def mount_command(
    mountpoint: Path, words: tuple[str, ...], source: str, *, strict: bool, foreground: bool
) -> None:
    """Mount at MOUNTPOINT; return when the file is usable. umount(8) ends it."""
    _need_root()
    options = parse_options([*words, *["strict=1"] * strict])
    target = _absolute(mountpoint)
    with swap.exclusively(target):
        if not foreground:
            _print_notes(_mount(target, options, source))
            return
        _check_mountpoint(target)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        fuse_fd = mount_fuse(target, source)
    os.set_inheritable(fuse_fd, True)  # noqa: FBT003
    os.execv(sys.executable, Mount(target, options, fuse_fd).command(-1))  # noqa: S606


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        click.echo(f"zswapfs: {note}", err=True)


def _say(text: str) -> None:
    """Say what has been done; it is done, whether that can be written or not."""
    try:
        click.echo(f"zswapfs: {text}")
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would fail on it at the end


def _take_down(mountpoint: Path, state: swap.State) -> None:
    """Undo all of it, in the right order. Raises SetupError with what is left as it was."""
    swap.swap_off(mountpoint, state.swaps)
    try:
        for device in state.loops:
            swap.detach(device, mountpoint / "swap")
        if state.source is not None:
            _unmount(mountpoint)
    except SetupError as error:
        off = "; swap is off" if state.swaps else ""
        raise SetupError(f"{error}{off}") from None


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _set_up(mountpoint: Path, options: Options, priority: int) -> tuple[str, list[str]]:
    """Mount, attach, swap on; whatever fails or interrupts takes all of it down again."""
    is_new = mountpoint == DEFAULT_MOUNTPOINT and not mountpoint.exists()
    if is_new:
        mountpoint.mkdir(mode=0o700)
    try:
        notes = _mount(mountpoint, options, swap.SOURCE_UP)
        device = swap.attach(mountpoint / "swap")
        swap.swap_on(device, priority)
        _ignore_signals()  # it is up, and 'up' will say so
    except BaseException:  # interrupted, too: at any moment, so look at what there is
        _ignore_signals()
        try:
            state = swap.state_of(mountpoint)
            if state.source == swap.SOURCE_UP:
                _take_down(mountpoint, state)
            if is_new:
                mountpoint.rmdir()
        except (ZswapfsError, OSError) as left:
            click.echo(f"zswapfs: {left}", err=True)  # what happened first is the error
        raise
    return device, notes


@cli.command()
@_MOUNTPOINT
@click.option("--size", help="Of the swap, like 8G or 50% of memory.  [default: 50%]")
@click.option("--mem-limit", help="Cap on the memory it takes, like 2G or 25%.  [default: none]")
@click.option("--tune", "tune_it", is_flag=True, help="Raise vm.page-cluster until 'down'.")
@click.option("--priority", default="100", show_default=True, help="Of the swap, 0 to 32767.")
@_OPTION_WORDS
@_STRICT
def up(  # noqa: PLR0913 one for each option
    mountpoint: Path,
    size: str | None,
    mem_limit: str | None,
    priority: str,
    words: tuple[str, ...],
    *,
    strict: bool,
    tune_it: bool,
) -> None:
    """Mount, attach a loop device, make swap, and turn it on."""
    _need_root()
    more = [f"size={size}"] if size is not None else []
    more += [f"mem_limit={mem_limit}"] if mem_limit is not None else []
    more += ["strict=1"] * strict
    options = parse_options([*words, *more])
    rank = parse_count(priority, "priority", 0, MAX_PRIORITY)
    target = _absolute(mountpoint)
    with swap.exclusively(target):
        state = swap.state_of(target)
        if state.source is not None and state.swaps:
            raise ConfigError(f"{target}: already up, on {state.swaps[0].device}")
        if state.source == swap.SOURCE_UP:
            _take_down(target, state)
        page_cluster = PageCluster()
        if tune_it:
            page_cluster.raise_for(target)
        try:
            device, notes = _set_up(target, options, rank)
        except BaseException:
            page_cluster.give_up(target)
            raise
        if page_cluster.is_low():
            low = f"vm.page-cluster is {page_cluster.value()}, {PAGE_CLUSTER} is faster"
            notes.append(f"{low}: 'up --tune'")
    _print_notes(notes)
    limit = (
        "" if options.mem_limit is None else f", at most {options.mem_limit >> 20} MiB of memory"
    )
    _say(f"{options.size >> 20} MiB of swap on {device}, priority {rank}{limit}")


@cli.command()
@_MOUNTPOINT
def down(mountpoint: Path) -> None:
    """Turn swap off and unmount; or say why not, and leave all as it is."""
    _need_root()
    target = _absolute(mountpoint)
    with swap.exclusively(target):
        state = swap.state_of(target)
        if state.source is None or not (state.loops or state.source == swap.SOURCE_UP):
            PageCluster().give_up(target)  # of an 'up' that was killed early
            raise ConfigError(f"{target}: not up")
        _take_down(target, state)
        PageCluster().give_up(target)
        if target == DEFAULT_MOUNTPOINT:
            with suppress(OSError):
                target.rmdir()
    _say(f"{target} is down")


@cli.command()
@_MOUNTPOINT
def restart(mountpoint: Path) -> None:
    """Have the daemon go on as this version, under live swap; or say why not."""
    _need_root()
    target = _absolute(mountpoint)
    with swap.exclusively(target):
        if mount_source(target) is None:
            raise ConfigError(f"{target}: no zswapfs is mounted there")
        process = find_processes(target).get("supervisor")
        if process is None:
            raise SetupError(f"{target}: its supervisor is gone")
        lines = _restart(target, process.pid)
    _say(f"{target} goes on with version {_said(lines, 'version')[0]}")


def _restart(mountpoint: Path, supervisor: int) -> list[str]:
    """Tell a supervisor to restart with our interpreter; return what it says when it has."""
    fifo, python = restart_fifo(mountpoint), restart_python(mountpoint)
    fifo.unlink(missing_ok=True)
    os.mkfifo(fifo, 0o600)
    try:
        python.write_text(sys.executable)
        with os.fdopen(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), "rb") as answer:
            os.kill(supervisor, signal.SIGHUP)
            return _wait_ready(answer.fileno(), mountpoint)
    finally:
        fifo.unlink(missing_ok=True)
        python.unlink(missing_ok=True)


@cli.command()
@_MOUNTPOINT
@click.option("--json", "as_json", is_flag=True, help="Print MOUNTPOINT/.stats.json.")
def stats(mountpoint: Path, *, as_json: bool) -> None:
    """Show what is stored and what it costs."""
    text = _read_json(_absolute(mountpoint))
    if as_json:
        click.echo(text, nl=False)
        return
    for name, value in json.loads(text).items():
        if name != "raw":
            click.echo(_readable(name, value))


def _readable(name: str, value: float) -> str:
    """Return a line of the table; sizes, in kB, as MiB."""
    if name.endswith(("Size", "Limit", "MemUsedTotal", "MemUsedMax", "DaemonRSS")):
        return f"{name:16}{value / 1024:14,.2f} MiB"
    if name in ("GoodCompress", "NoCompress"):
        return f"{name:16}{value:11,} %"
    return f"{name:16}{value:14,.2f}" if isinstance(value, float) else f"{name:16}{value:11,}"


def _show_progress(mountpoint: Path, work: "Future[int]", before: dict[str, int]) -> None:
    """Draw a bar, on a terminal, until the work is done: free bytes inside chunks that are gone."""
    if not sys.stderr.isatty():
        return
    with click.progressbar(
        length=max(before["free_bytes"], 1), label="compacting", file=sys.stderr
    ) as bar:
        while not wait([work], timeout=PROGRESS_SECONDS).done:
            now = json.loads(_read_json(mountpoint))["raw"]
            bar.update(max(0, before["free_bytes"] - now["free_bytes"] - bar.pos))
        bar.update(bar.length - bar.pos if bar.length else 0)


@cli.command()
@_MOUNTPOINT
def compact(mountpoint: Path) -> None:
    """Give all memory back that can be given, now."""
    _need_root()
    target = _absolute(mountpoint)
    before = json.loads(_read_json(target))["raw"]
    with ThreadPoolExecutor(1) as executor:
        work = executor.submit((target / ".compact").write_text, "1")
        _show_progress(target, work, before)
        try:
            work.result()
        except OSError as error:
            raise SetupError(f"{target}: {error.strerror}") from None
    after = json.loads(_read_json(target))["raw"]
    won = before["mem_used_bytes"] - after["mem_used_bytes"]
    moved = after["pages_compacted"] - before["pages_compacted"]
    click.echo(
        f"zswapfs: returned {max(won, 0) / (1 << 20):.1f} MiB, moved {moved} blocks, "
        f"now {after['mem_used_bytes'] / (1 << 20):.1f} MiB for "
        f"{after['compr_bytes'] / (1 << 20):.1f} MiB of compressed content"
    )


@cli.command("check")
@_MOUNTPOINT
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def check_command(mountpoint: Path, *, as_json: bool) -> None:
    """Tell which protections are in force, and which settings hurt.

    Exits 1 when a protection is missing.
    """
    _need_root()
    findings = check_daemon(_absolute(mountpoint))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            click.echo(f"{finding.state:8}{finding.name:18}{finding.text}")
    sys.exit(any(finding.state == MISSING for finding in findings))


def _guarded(words: list[str]) -> None:
    # Whoever is told to end takes down what it has begun to set up.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        cli(words, prog_name="zswapfs")
    except (ZswapfsError, OSError) as error:
        sys.exit(f"zswapfs: {error}")


def main() -> None:
    """Run the command line."""
    _guarded(sys.argv[1:])


def mount_helper() -> None:
    """Run as mount.fuse.zswapfs SOURCE MOUNTPOINT [-sfnv] [-N NS] [-o OPTIONS] [-t TYPE].

    mount(8) calls its helpers like that, also for lines of fstab.
    """
    words = ["mount"]
    arguments = iter(sys.argv[1:])
    places = []
    for word in arguments:
        if word == "-o":
            words += ["-o", next(arguments, "")]
        elif word in ("-t", "-N"):
            next(arguments, None)
        elif not word.startswith("-"):
            places.append(word)
        elif "f" in word:
            return  # mount -f: all but the mounting
    if len(places) != 2:  # noqa: PLR2004 source and mountpoint
        click.echo("usage: mount.fuse.zswapfs SOURCE MOUNTPOINT [-o OPTIONS]", err=True)
        sys.exit(2)
    # The name that fstab gives it, or 'mount -a' would not know that it is mounted.
    _guarded([*words, "--source", places[0], "--", places[1]])
