"""Ctrl-C: one line, exit code 130, within three seconds and without an orphan, whatever the program is doing.

Python raises KeyboardInterrupt in the main thread once that comes back from C code, which may be long after; C code
that was importing may turn it into another error; and threads and processes that still compute are waited for. So a
thread watches for the signal too (through the wake-up descriptor, which needs no main thread), and ends what has not
ended by itself after GRACE_SECONDS. Processes that the program begins don't get the signal: it ends them.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

GRACE_SECONDS = 1.0  # for what has to be put in order: temporary files, a params.yaml that was changed
LAST_SECONDS = 0.3  # after the other processes' end, for those who waited for them
LINE = b"interrupted\n"
# What cleans up behind multiprocessing, and ends last; what brings to its end what is paid for, and ends by itself
SPARED = ("multiprocessing.resource_tracker", "stages.engine.apart")
EXIT_CODE = 128 + signal.SIGINT  # as shells count
_came = threading.Event()  # the signal


def interrupted() -> bool:
    """Whether Ctrl-C has come, so that no process should be begun any more."""
    return _came.is_set()


def end_at_once() -> None:
    """Until `interrupts` is entered there is nothing to put in order: one line, and out. For the program's imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a program in the background ignores it
        signal.signal(signal.SIGINT, _end)


def _end(*_: Any) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, LINE)
    os._exit(EXIT_CODE)


@contextmanager
def interrupts() -> Iterator[None]:
    """Raises SystemExit(130) in place of whatever the block raises after a Ctrl-C, with every process of its own ended.

    In another thread than the main one, and where SIGINT is ignored, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    watch = _Watch()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt) and not watch.seen():
            raise
        watch.end_processes()
        watch.say()
        raise SystemExit(EXIT_CODE) from None  # the watch goes on: exiting waits for threads
    finally:
        if not interrupted():
            watch.stop()


class _Watch:
    """The thread that waits for the signal."""

    def __init__(self) -> None:
        import psutil

        self._program = psutil.Process()
        self._gone = suppress(psutil.Error, OSError)  # a process, or a standard error, that has ended meanwhile
        self._processes: set[psutil.Process] = set()
        self._said = threading.Lock()
        _came.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._writer)  # which ends the thread

    def seen(self) -> bool:
        """Whether the signal has come; the thread may need a moment to notice."""
        return _came.wait(0.05)

    def _run(self) -> None:
        while received := os.read(self._reader, 1):
            if received[0] == signal.SIGINT:
                break
        else:
            os.close(self._reader)
            return
        _came.set()
        self._find_processes()  # before the first of them ends: then its own would no longer be found
        threading.Event().wait(GRACE_SECONDS)
        self.end_processes()
        threading.Event().wait(LAST_SECONDS)
        self.end_processes()
        self.say()
        os._exit(EXIT_CODE)

    def _find_processes(self) -> None:
        """All that this program began, and theirs, but those SPARED."""
        for process in self._program.children(recursive=True):
            with self._gone:
                if not any(name in " ".join(process.cmdline()) for name in SPARED):
                    self._processes.add(process)

    def end_processes(self) -> None:
        self._find_processes()
        for process in list(self._processes):
            with self._gone:
                process.kill()  # never one that has since got an old one's number

    def say(self) -> None:
        if self._said.acquire(blocking=False):
            with self._gone:
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, LINE)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Threads and processes begun in the block, and whatever they begin, don't get SIGINT."""
    resource_tracker.ensure_running()  # with the first process it would begin, and let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
