"""Holds /dev/fuse and the region; forks the worker that uses them, and the next when it dies.

A program of its own, so that nothing of the command line stays in memory with it:

    python -P -m zswapfs.supervisor MOUNTPOINT FUSE_FD READY_FD OPTIONS [REGION_FD,WORKER,RESTARTS]

The last word is there when it takes the place of an earlier one, with its worker. What always
holds is in native/README.md, under Recovery.
"""

import ctypes
import errno
import gc
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from . import worker
from .config import Options, parse_options, run_file
from .errors import SetupError, ZswapfsError
from .heartbeat import PATIENCE, Heartbeat
from .privileges import keep_out_others
from .store import format_region, lane_steps, probe_region, region_memory

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""Handled here; blocked while nobody could handle them, by whoever starts this program, too."""
LEAST_PAUSE, MOST_PAUSE = 0.1, 5.0
SETTLED_SECONDS = 1.0
"""A worker that served for less is followed by the next one after a pause."""
PROBE_SECONDS = 20
NAME, WORKER_NAME = "zswapfs", "zswapfs-worker"

# -P: the current directory may hold a zswapfs that is not built.
_PROGRAM = (sys.executable, "-P", "-m", "zswapfs.supervisor")
_PROBE = "--can-adopt"
_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


def mount_fuse(mountpoint: Path, source: str) -> int:
    """Mount an empty FUSE filesystem; return the descriptor that its requests come from.

    ``source`` is what /proc/mounts will name it. Raises SetupError.
    """
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SetupError(f"/dev/fuse: {error.strerror}; is the fuse module there?") from None
    words = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions"
    words += f",max_read={worker.MAX_REQUEST_BYTES}"
    flags = _MS_NOSUID | _MS_NODEV
    target = os.fsencode(mountpoint)
    if _libc.mount(source.encode(), target, b"fuse.zswapfs", flags, words.encode()):
        reason = os.strerror(ctypes.get_errno())
        os.close(fd)
        raise SetupError(f"{mountpoint}: cannot mount: {reason}")
    return fd


def unmount(mountpoint: Path, *, lazily: bool = False) -> None:
    """Unmount. Raises OSError (EBUSY: in use)."""
    if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH if lazily else 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(mountpoint))


@dataclass(frozen=True)
class Mount:
    """What a supervisor holds, and hands on to the program that takes its place."""

    mountpoint: Path
    options: Options
    fuse_fd: int
    region_fd: int = -1
    worker: int = 0
    """Process id."""
    restarts: int = 0

    def command(self, ready_fd: int) -> list[str]:
        """Return what to run as the daemon; all descriptors must be open in it.

        ``ready_fd`` gets lines: ``note: ...``, then ``ready`` or ``error: ...``; -1: nobody does.
        """
        words = [str(self.mountpoint), str(self.fuse_fd), str(ready_fd), self.options.words()]
        if self.worker:
            words.append(f"{self.region_fd},{self.worker},{self.restarts}")
        return [*_PROGRAM, *words]


def restart_fifo(mountpoint: Path) -> Path:
    """Return where a supervisor that is told to restart (SIGHUP) says what became of it."""
    return run_file(mountpoint, "restart")


def complain(text: str) -> None:
    """Say something on standard error, which for a daemon is the kernel's log."""
    worker.write_line(2, f"zswapfs: {text}")


def _be_called(name: str) -> None:
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _worker_main(job: worker.Job) -> NoReturn:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _be_called(WORKER_NAME)
        code = worker.run(job)
    except BaseException as error:  # noqa: BLE001 the last chance to say anything
        job.say(f"error: {error}")
    finally:
        os._exit(code)


class _Worker:
    """One worker process, from its fork until it has been waited for."""

    def __init__(self, mount: Mount, ready_fd: int, *, names: bool) -> None:
        self.says_fd, says = os.pipe()
        try:
            self.pid = os.fork()
            if self.pid == 0:
                with suppress(OSError):
                    os.close(ready_fd)
                job = worker.Job(
                    mount.options, mount.fuse_fd, mount.region_fd, says, mount.restarts, names
                )
                _worker_main(job)
        except OSError:
            os.close(self.says_fd)
            raise
        finally:
            os.close(says)
        self.served_from: float | None = None
        self._text = b""

    def lines(self) -> list[str] | None:
        """Return what it has said since the last call; None once it has ended, all its threads."""
        more = os.read(self.says_fd, 4096)
        *lines, self._text = (self._text + more).split(b"\n")
        said = [line.decode(errors="surrogateescape") for line in lines]
        if "serving" in said:
            self.served_from = time.monotonic()
        return said if more else None

    def wait(self) -> int:
        """Wait for its end, free everything, return its exit code (below 0: the signal)."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.says_fd)
        return os.waitstatus_to_exitcode(status)

    def has_settled(self) -> bool:
        """Say whether it served for a while."""
        since = self.served_from
        return since is not None and time.monotonic() - since >= SETTLED_SECONDS


def _has_requests(fuse_fd: int) -> bool:
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


class Supervisor:
    """The daemon's life: one worker after the other until the kernel has unmounted."""

    def __init__(self, mount: Mount, ready_fd: int) -> None:
        self._mount = mount
        self._ready_fd = ready_fd
        self._usable = mount.restarts > 0
        self._names = True
        self._pause = 0.0
        self._signal_fd, signals = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(signals)
        for number in SIGNALS:
            signal.signal(number, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def run(self) -> int:
        """Return the daemon's exit code: 0 after the unmount, 1 when it never became usable."""
        while True:
            process = self._fork()
            code = self._attend(process)
            if code == 0:
                return 0
            if not self._usable:
                with suppress(OSError):
                    unmount(self._mount.mountpoint, lazily=True)
                return 1
            self._mount = replace(self._mount, restarts=self._mount.restarts + 1)
            if code == worker.FAILED_AGAIN and self._names:
                self._names = False
                self._complain("names and statistics are gone until 'zswapfs restart'")
            self._pause = 0 if process.has_settled() else self._longer_pause()
            again = f" in {self._pause:.1f} s" if self._pause else ""
            self._complain(f"the worker ended with {code}; the next one takes over{again}")
            time.sleep(self._pause)

    def _longer_pause(self) -> float:
        return min(max(2 * self._pause, LEAST_PAUSE), MOST_PAUSE)

    def _fork(self) -> _Worker:
        while True:
            try:
                return _Worker(self._mount, self._ready_fd, names=self._names)
            except OSError as error:
                if not self._usable:
                    raise
                self._pause = self._longer_pause()
                self._complain(f"cannot fork: {error.strerror}; again in {self._pause:.1f} s")
                time.sleep(self._pause)

    def _complain(self, text: str) -> None:
        complain(f"{self._mount.mountpoint}: {text}")

    def _attend(self, process: _Worker) -> int:
        """Listen to a worker and look after it until it ends; return its exit code."""
        poll = select.poll()
        for fd in (process.says_fd, self._signal_fd):
            poll.register(fd, select.POLLIN)
        heartbeat = Heartbeat()
        interval = self._mount.options.heartbeat / PATIENCE
        look_at: float | None = None
        while True:
            wait = None if look_at is None else max(0.0, look_at - time.monotonic()) * 1000
            ready = {fd for fd, _ in poll.poll(wait)}
            if process.says_fd in ready and not self._listen(process):
                return process.wait()
            if self._signal_fd in ready:
                self._obey(os.read(self._signal_fd, 64), process)
            now = time.monotonic()
            if look_at is None and process.served_from is not None and interval:
                look_at = now + interval
            if look_at is not None and now >= look_at:
                look_at = now + interval
                waiting = _has_requests(self._mount.fuse_fd)
                steps = lane_steps(self._mount.region_fd)[: self._mount.options.lanes]
                if heartbeat.hangs(steps, waiting=waiting):
                    self._complain("the worker hangs")
                    os.kill(process.pid, signal.SIGKILL)

    def _listen(self, process: _Worker) -> bool:
        """Pass on what a worker says; return False once it will say no more."""
        lines = process.lines()
        for line in lines or []:
            self._hear(line)
        return lines is not None

    def _hear(self, line: str) -> None:
        """Pass it on to whoever has started us, or a restart; later, or else, to the log."""
        kind, _, text = line.partition(": ")
        if self._ready_fd >= 0 and kind != "serving":
            worker.write_line(self._ready_fd, line)
        elif kind == "error" or (kind == "note" and not self._usable):
            self._complain(text)
        if kind == "ready":
            self._usable = True
            if self._ready_fd >= 0:
                os.close(self._ready_fd)
                self._ready_fd = -1

    def _obey(self, numbers: bytes, process: _Worker) -> None:
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._stop()
        if signal.SIGHUP in numbers and self._usable and self._ready_fd < 0:
            self._restart(process)

    def _stop(self) -> None:
        """Unmount, if nobody uses the mount; under live swap nothing changes."""
        try:
            unmount(self._mount.mountpoint)
        except OSError as error:
            if error.errno != errno.EINVAL:
                self._complain(f"{error.strerror}; goes on")

    def _restart(self, process: _Worker) -> None:
        """Become the installed program, if that can go on from here; or say why not."""
        fifo = -1
        with suppress(OSError):
            path = restart_fifo(self._mount.mountpoint)
            fifo = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        reason = self._refusal() or self._become(process, fifo)
        self._complain(f"no restart: {reason}")
        if fifo >= 0:
            worker.write_line(fifo, f"error: {reason}")
            os.close(fifo)

    def _refusal(self) -> str:
        """Have the installed program try region and options; return what is wrong, or nothing."""
        fd = self._mount.region_fd
        words = [*_PROGRAM, _PROBE, str(fd), self._mount.options.words()]
        try:
            done = subprocess.run(
                words,
                pass_fds=(fd,),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 0:
            return ""
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"the installed program ends with {done.returncode}"

    def _become(self, process: _Worker, fifo: int) -> str:
        """Execute the installed program in our place; return why that could not be."""
        mount = replace(self._mount, worker=process.pid, restarts=self._mount.restarts + 1)
        fds = [fd for fd in (mount.fuse_fd, mount.region_fd, fifo) if fd >= 0]
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for fd in fds:
            os.set_inheritable(fd, True)  # noqa: FBT003
        try:
            os.execv(sys.executable, mount.command(fifo))  # noqa: S606
        except OSError as error:
            for fd in fds:
                os.set_inheritable(fd, False)  # noqa: FBT003
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return str(error)


def _new_region(mount: Mount, missing: list[str], ready_fd: int) -> int:
    """Return the region, laid out. Whoever cannot have it is told, and loses the mount.

    ``missing`` are protections that this process has not; the worker tells what it has not itself.
    With strict they are a reason not to start.
    """
    try:
        fd, noswap = region_memory()
        notes = []
        if not noswap:
            notes.append(
                "no noswap tmpfs (Linux 6.4): the region is only locked; not safe to recover"
            )
        if not worker.has_resend():
            notes.append(
                "no FUSE_NOTIFY_RESEND (Linux 6.9): if the worker dies, what it is at fails"
            )
        options = mount.options
        if options.strict and (missing or notes):
            raise SetupError(f"strict: {'; '.join(missing + notes)}")  # noqa: TRY301 see below
        for text in notes:
            _tell(ready_fd, "note", text)
        format_region(fd, options.nr_pages, options.mem_limit, reserve=options.reserve)
    except BaseException:
        unmount(mount.mountpoint, lazily=True)
        raise
    return fd


def _tell(ready_fd: int, kind: str, text: str) -> None:
    if ready_fd >= 0:
        worker.write_line(ready_fd, f"{kind}: {text}")
    else:
        complain(text)


def serve(mount: Mount, ready_fd: int) -> int:
    """Run the daemon until the unmount; return its exit code.

    SIGTERM and SIGINT unmount, if nobody uses the mount; under live swap they change nothing.
    SIGHUP restarts with the installed program.
    """
    _be_called(NAME)
    missing = worker.protect_memory()
    keep_out_others()
    for fd in (mount.fuse_fd, mount.region_fd, ready_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)  # noqa: FBT003
    if mount.worker:
        with suppress(ProcessLookupError):
            os.kill(mount.worker, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(mount.worker, 0)
    else:
        mount = replace(mount, region_fd=_new_region(mount, missing, ready_fd))
    gc.collect()
    gc.freeze()
    gc.disable()
    return Supervisor(mount, ready_fd).run()


def _probe(region_fd: str, words: str) -> None:
    """Exit with a line on standard error if a region or its options are not for this version."""
    try:
        probe_region(int(region_fd))
        parse_options([words])
    except (ZswapfsError, OSError) as error:
        sys.exit(f"the installed version cannot go on from here: {error}")


def main() -> None:
    """Be the daemon."""
    # Where it is ignored, which is inherited, nobody can wait for a worker.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.argv[1] == _PROBE:
        _probe(*sys.argv[2:])
        return
    mountpoint, fuse_fd, ready_fd, words, *earlier = sys.argv[1:]
    try:
        mount = Mount(Path(mountpoint), parse_options([words]), int(fuse_fd))
        for word in earlier:
            region_fd, process, restarts = map(int, word.split(","))
            mount = replace(mount, region_fd=region_fd, worker=process, restarts=restarts)
        code = serve(mount, int(ready_fd))
    except (ZswapfsError, OSError) as error:
        _tell(int(ready_fd), "error", str(error))
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
