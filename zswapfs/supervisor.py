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
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from . import worker
from .config import parse_options
from .errors import SetupError, ZswapfsError
from .heartbeat import PATIENCE, START_SECONDS, Heartbeat
from .mount import SIGNALS, Mount, restart_fifo, restart_python, unmount
from .privileges import keep_out_others
from .program import Program
from .protect import leave_harmful_cgroups
from .store import format_region, lane_steps, probe_region, region_memory

LEAST_PAUSE, MOST_PAUSE = 0.1, 5.0
SETTLED_SECONDS = 1.0
"""A worker that served for less is followed by the next one after a pause."""
MOST_START_SECONDS = 3600.0
LOUD_PAUSE = 1.0
MOST_UNSAID = 20
NAMES_SECONDS = 10.0
"""When two control planes in a row have failed sooner than this, there is no third."""
PROBE_SECONDS = 20.0
DOWN_SECONDS = 3600.0
NAME, WORKER_NAME = "zswapfs", "zswapfs-worker"

_PROBE = "--can-adopt"
_FROM_TERMINALS = (signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""Would end or stop a daemon in the foreground together with its worker."""
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


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

    def __init__(self, job: worker.Job, ready_fd: int) -> None:
        self.says_fd, says = os.pipe()
        try:
            self.pid = os.fork()
            if self.pid == 0:
                with suppress(OSError):
                    os.close(ready_fd)
                _worker_main(replace(job, says_fd=says))
        except OSError:
            os.close(self.says_fd)
            raise
        finally:
            os.close(says)
        self.began = time.monotonic()
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

    def kill(self) -> None:
        """End it; ``lines`` tells when it has ended."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end, free everything, return its exit code (below 0: the signal)."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.says_fd)
        return os.waitstatus_to_exitcode(status)

    def has_served_for(self, seconds: float) -> bool:
        """Say whether it served for so long."""
        since = self.served_from
        return since is not None and time.monotonic() - since >= seconds


class _Watch:
    """Whether a worker starts, and then moves; ``heartbeat`` 0: nobody looks."""

    def __init__(self, process: _Worker, mount: Mount, start_seconds: float) -> None:
        self._process = process
        self._mount = mount
        self._interval = mount.options.heartbeat / PATIENCE
        self._heartbeat: Heartbeat | None = None
        self._hung = False
        self.look_at = process.began + start_seconds if self._interval else None

    def started(self) -> None:
        """Look at its lanes from now on."""
        if self._heartbeat is None and self._interval:
            self._heartbeat = Heartbeat()
            self.look_at = time.monotonic() + self._interval

    def is_well(self) -> bool:
        """Say whether it serves, for all that is known."""
        return self._process.served_from is not None and not self._hung

    def hangs(self) -> bool:
        """Look, if it is time; say whether it hangs, once: then it is killed."""
        now = time.monotonic()
        if self.look_at is None or now < self.look_at:
            return False
        self.look_at = now + self._interval
        if self._heartbeat is not None:
            waiting = _has_requests(self._mount.fuse_fd)
            steps = lane_steps(self._mount.region_fd)[: self._mount.options.lanes]
            if not self._heartbeat.hangs(steps, waiting=waiting):
                return False
        self.look_at = None
        self._hung = True
        return True


def _has_requests(fuse_fd: int) -> bool:
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


class Supervisor:
    """The daemon's life: one worker after the other until the kernel has unmounted."""

    def __init__(self, mount: Mount, ready_fd: int, memory_fd: int) -> None:
        self._mount = mount
        self._ready_fd = ready_fd
        self._restart_fd = -1
        """Where who asked for a restart listens, while it is tried."""
        self._memory_fd = memory_fd
        self._usable = mount.worker > 0
        self._names = True
        self._failures = 0
        self._pause = 0.0
        self._python = sys.executable
        self._start_seconds = START_SECONDS
        self._unsaid: list[str] = []
        self._programs: dict[str, Program] = {}
        """By what they are for: 'restart', 'down'."""
        self._signal_fd, signals = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def run(self) -> int:
        """Return the daemon's exit code: 0 after the unmount, 1 when it never became usable."""
        while True:
            process = self._fork()
            self._mount = replace(self._mount, worker=process.pid)
            code = self._look_after(process)
            if code == 0:
                self._say_all()
                return 0
            if not self._usable:
                self._say_all()
                with suppress(OSError):
                    unmount(self._mount.mountpoint, lazily=True)
                return 1
            self._mount = replace(self._mount, restarts=self._mount.restarts + 1)
            if code == worker.FAILED:
                self._count_failure(process)
            self._pause = 0 if process.has_served_for(SETTLED_SECONDS) else self._longer_pause()
            again = f" in {self._pause:.1f} s" if self._pause else ""
            self._complain(f"the worker ended with {code}; the next one takes over{again}")
            if self._pause > LOUD_PAUSE:
                self._say_all()  # who never serves has to be known of all the same
            time.sleep(self._pause)

    def _count_failure(self, process: _Worker) -> None:
        """Do without what fails again and again: pages matter more than names."""
        self._failures = 1 if process.has_served_for(NAMES_SECONDS) else self._failures + 1
        if self._failures > 1 and self._names:
            self._names = False
            text = "names and statistics are gone until 'zswapfs restart'"
            self._complain(text)
            self._answer(f"error: pages are served, but {text}")

    def _longer_pause(self) -> float:
        return min(max(2 * self._pause, LEAST_PAUSE), MOST_PAUSE)

    def _job(self) -> worker.Job:
        mount = self._mount
        return worker.Job(
            options=mount.options,
            fuse_fd=mount.fuse_fd,
            region_fd=mount.region_fd,
            says_fd=-1,
            memory_fd=self._memory_fd,
            restarts=mount.restarts,
            names=self._names,
        )

    def _fork(self) -> _Worker:
        while True:
            try:
                return _Worker(self._job(), self._ready_fd)
            except (OSError, MemoryError) as error:
                if not self._usable:
                    raise
                self._pause = self._longer_pause()
                self._complain(f"cannot fork: {error}; again in {self._pause:.1f} s")
                if self._pause > LOUD_PAUSE:
                    self._say_all()
                time.sleep(self._pause)

    def _complain(self, text: str) -> None:
        """Have it said when a worker serves.

        The kernel's log takes memory, and while nobody serves, who asks for memory may wait for
        the next worker: for us.
        """
        self._unsaid = [*self._unsaid[-MOST_UNSAID + 1 :], text]

    def _say_all(self) -> None:
        while self._unsaid:
            complain(f"{self._mount.mountpoint}: {self._unsaid.pop(0)}")

    def _look_after(self, process: _Worker) -> int:
        """Attend to a worker until it ends, whatever goes wrong here; return its exit code."""
        while True:
            try:
                return self._attend(process)
            except Exception as error:  # noqa: BLE001 nobody else would replace the worker
                self._complain(f"{type(error).__name__}: {error}; goes on")
                time.sleep(LEAST_PAUSE)

    def _attend(self, process: _Worker) -> int:
        """Listen to a worker and look after it until it ends; return its exit code."""
        watch = _Watch(process, self._mount, self._start_seconds)
        while True:
            if watch.is_well():
                self._say_all()
            ready = self._wait(process.says_fd, watch.look_at)
            if process.says_fd in ready and not self._listen(process):
                return process.wait()
            if process.served_from is not None:
                watch.started()
            if self._signal_fd in ready:
                self._obey(os.read(self._signal_fd, 64))
            self._look_at_programs(ready)
            if watch.hangs():
                self._complain("the worker hangs")
                if process.served_from is None:
                    self._start_seconds = min(2 * self._start_seconds, MOST_START_SECONDS)
                process.kill()

    def _wait(self, worker_fd: int, look_at: float | None) -> set[int]:
        """Return the descriptors that have something to say; none when it is time to look."""
        poll = select.poll()
        programs = self._programs.values()
        for fd in (worker_fd, self._signal_fd, *(program.fd for program in programs)):
            poll.register(fd, select.POLLIN)
        times = [at for at in (look_at, *(each.late_at for each in programs)) if at is not None]
        wait = max(0.0, min(times) - time.monotonic()) * 1000 if times else None
        return {fd for fd, _ in poll.poll(wait)}

    def _listen(self, process: _Worker) -> bool:
        """Pass on what a worker says; return False once it will say no more."""
        lines = process.lines()
        for line in lines or []:
            self._hear(line)
        return lines is not None

    def _hear(self, line: str) -> None:
        """Pass it on to whoever has started us, or a restart; later, or else, to the log."""
        kind, _, text = line.partition(": ")
        if kind == "ready":
            self._usable = True
            self._answer(line)
        elif kind == "error" and self._ready_fd >= 0:
            worker.write_line(self._ready_fd, line)
        elif kind == "error":
            self._complain(text)

    def _answer(self, line: str) -> None:
        """Tell whoever has started us the last that there is to tell."""
        if self._ready_fd >= 0:
            worker.write_line(self._ready_fd, line)
            os.close(self._ready_fd)
            self._ready_fd = -1

    def _run(self, what: str, words: list[str], *, seconds: float) -> None:
        """Run a program beside, with the region; ``_ended`` gets to know what became of it."""
        try:
            keep = (self._mount.region_fd,)
            self._programs[what] = Program(words, keep=keep, seconds=seconds)
        except OSError as error:
            self._ended(what, -1, str(error))

    def _look_at_programs(self, ready: set[int]) -> None:
        for what, program in list(self._programs.items()):
            if program.fd in ready:
                del self._programs[what]
                self._ended(what, *program.close())
            elif program.is_late():
                program.kill()

    def _ended(self, what: str, code: int, said: str) -> None:
        """Go on after a program with its exit code and the last that it said."""
        if what == "restart":
            self._tried(code, said)
        elif code:
            self._complain(f"in use, goes on: {said.removeprefix('zswapfs: ')}")

    def _obey(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._stop()
        if signal.SIGHUP in numbers and self._usable and "restart" not in self._programs:
            self._restart()

    def _stop(self) -> None:
        """Unmount. Where swap is on, have its pages come back before; without room it goes on."""
        try:
            unmount(self._mount.mountpoint)
        except OSError as error:
            if error.errno == errno.EBUSY and "down" not in self._programs:
                words = [sys.executable, "-P", "-m", "zswapfs", "down"]
                self._run("down", [*words, str(self._mount.mountpoint)], seconds=DOWN_SECONDS)
            elif error.errno not in (errno.EBUSY, errno.EINVAL):
                self._complain(f"{error.strerror}; goes on")

    def _restart(self) -> None:
        """Have the installed program try what it would get, before anything is touched."""
        with suppress(OSError):
            path = restart_fifo(self._mount.mountpoint)
            self._restart_fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not worker.has_resend():
            self._refuse("before Linux 6.9 it would fail what swap is at; 'down', then 'up'")
            return
        self._python = _python_for(self._mount.mountpoint)
        python, *words = self._mount.command(self._restart_fd, self._python)
        at = words.index(str(self._mount.mountpoint))
        self._run("restart", [python, *words[:at], _PROBE, *words[at:]], seconds=PROBE_SECONDS)

    def _tried(self, code: int, said: str) -> None:
        """Become the installed program, or say why not."""
        if code or not said.startswith("version: "):
            self._refuse(said or f"the installed program ended with {code}")
            return
        if "down" in self._programs:
            self._refuse("it is about to go down")
            return
        if self._restart_fd >= 0:
            worker.write_line(self._restart_fd, said)
        mount = replace(self._mount, restarts=self._mount.restarts + 1)
        self._refuse(self._become(mount))

    def _refuse(self, reason: str) -> None:
        self._complain(f"no restart: {reason}")
        if self._restart_fd >= 0:
            worker.write_line(self._restart_fd, f"error: {reason}")
            os.close(self._restart_fd)
            self._restart_fd = -1

    def _become(self, mount: Mount) -> str:
        """Execute the installed program in our place; return why that could not be."""
        fds = [fd for fd in (mount.fuse_fd, mount.region_fd, self._restart_fd) if fd >= 0]
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._keep_signals()
        for fd in fds:
            os.set_inheritable(fd, True)  # noqa: FBT003
        try:
            os.execv(self._python, mount.command(self._restart_fd, self._python))  # noqa: S606
        except OSError as error:
            for fd in fds:
                os.set_inheritable(fd, False)  # noqa: FBT003
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return str(error)

    def _keep_signals(self) -> None:
        """Have what came and was not obeyed come again, after all are blocked: to the next one."""
        with suppress(BlockingIOError):
            for number in set(os.read(self._signal_fd, 64)) - {signal.SIGHUP}:
                signal.raise_signal(number)


def _python_for(mountpoint: Path) -> str:
    """Return the interpreter of the version that the restart is to have."""
    try:
        return restart_python(mountpoint).read_text() or sys.executable
    except OSError:
        return sys.executable


def _new_region(mount: Mount, missing: list[str], ready_fd: int) -> int:
    """Return the region, laid out. Whoever cannot have it is told, and loses the mount.

    ``missing`` are protections that cannot be had; with strict they are a reason not to start.
    """
    try:
        fd, noswap = region_memory()
        notes = ["; ".join(missing)] if missing else []
        if not noswap:
            notes.append(
                "no noswap tmpfs (Linux 6.4): the region is only locked; not safe to recover"
            )
        if not worker.has_resend():
            notes.append(
                "no FUSE_NOTIFY_RESEND (Linux 6.9): if the worker dies, what it is at fails"
            )
        options = mount.options
        if options.strict and notes:
            raise SetupError(f"strict: {'; '.join(notes)}")  # noqa: TRY301 see below
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


def _end_earlier(mount: Mount) -> None:
    """End the worker of the program whose place this one has taken."""
    with suppress(ProcessLookupError):
        os.kill(mount.worker, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(mount.worker, 0)


def serve(mount: Mount, ready_fd: int) -> int:
    """Run the daemon until the unmount; return its exit code.

    SIGTERM and SIGINT unmount; pages that are in swap come back before, and where there is no room
    for them nothing changes. SIGHUP restarts with the installed program.
    """
    _be_called(NAME)
    for number in _FROM_TERMINALS:
        signal.signal(number, signal.SIG_IGN)
    missing = leave_harmful_cgroups() + worker.protect_memory(bring_in=mount.worker > 0)
    memory_fd = worker.open_own_memory()
    keep_out_others()
    for fd in (mount.fuse_fd, mount.region_fd, ready_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)  # noqa: FBT003
    if not mount.worker:
        mount = replace(mount, region_fd=_new_region(mount, missing, ready_fd))
    gc.collect()
    gc.freeze()
    gc.disable()
    supervisor = Supervisor(mount, ready_fd, memory_fd)
    if mount.worker:
        # From here on nobody serves pages, and nothing may be waited for that is in swap.
        _end_earlier(mount)
    return supervisor.run()


def _parse(words: list[str]) -> tuple[Mount, int]:
    """Return what ``Mount.command`` made the words of: the mount, and where to be ready."""
    mountpoint, fuse_fd, ready_fd, options, *earlier = words
    mount = Mount(Path(mountpoint), parse_options([options]), int(fuse_fd))
    for word in earlier:
        region_fd, process, restarts = map(int, word.split(","))
        mount = replace(mount, region_fd=region_fd, worker=process, restarts=restarts)
    return mount, int(ready_fd)


def _try(words: list[str]) -> None:
    """Say which version this is; or exit, where it cannot go on from what another one has."""
    from . import __version__  # noqa: PLC0415 see there

    try:
        mount, _ = _parse(words)
        probe_region(mount.region_fd)
    except (ZswapfsError, OSError, ValueError) as error:
        sys.exit(f"version {__version__} cannot go on from here: {error}")
    worker.write_line(2, f"version: {__version__}")


def main() -> None:
    """Be the daemon."""
    # Where it is ignored, which is inherited, nobody can wait for a worker.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.argv[1] == _PROBE:
        _try(sys.argv[2:])
        return
    ready_fd = int(sys.argv[3])
    try:
        code = serve(*_parse(sys.argv[1:]))
    except (ZswapfsError, OSError) as error:
        _tell(ready_fd, "error", str(error))
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
