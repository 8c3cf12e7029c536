"""What can go wrong, and whose fault it is.

PipelineError: the user must act; its text is one line that names the file or key, what was found and what is expected.
Skip: one clip can't be used; the reason is recorded and the run goes on. Died: its decoder crashed or was stopped,
which may be the machine's doing: the clip is tried once more. A fault of the machine (an error that the system has a
number for, no memory) says nothing about a clip: it is retried, then stops the stage, and is never recorded.
"""

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from stages.engine.interrupts import interrupts

T = TypeVar("T")

# What must be put right before the stage can go on; of other errors of the system, OTHERWISE
REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room")
REMEDIES |= {errno.EROFS: "make it writable"}
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM), "check its permissions")
REMEDIES |= dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), "check the disk or the network folder")
REMEDIES |= dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "bring the file or folder back")
REMEDIES |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)")
REMEDIES |= dict.fromkeys((errno.ENOMEM, errno.EAGAIN), "free memory or processes")
REMEDIES |= dict.fromkeys((errno.ENOLCK, errno.ENOTSUP), "mount it with locks")
OTHERWISE = "check the disk or the network folder"
LARGEST_ERRNO = 4095  # of Linux; FFmpeg gives its own errors larger numbers

ATTEMPTS = 3  # at something that the machine keeps from working
FIRST_WAIT = 0.5  # seconds before the second, twice that before the third


class PipelineError(Exception):
    """Stops the stage; shown without a traceback, exit code 1."""


class Skip(Exception):
    """This clip can't be used; str(error) is the reason that reports/skipped.csv shows."""


# Reasons of clips that lack something by nature: nothing is wrong with them, and no clip of a kind is too many
NO_FILE, NO_TRANSCRIPT = "no media file", "no transcript"
NO_STREAM = {"audio": "no audio stream", "video": "no video stream"}
NO_KNOWN_WORD = "no word that the lexicon knows"
LACKING = {NO_FILE, NO_TRANSCRIPT, f"no ranking: {NO_KNOWN_WORD}", *NO_STREAM.values()}


class Died(Skip):
    """The clip's decoder crashed, was ended from outside or took too long."""


def one_line(error: BaseException) -> str:
    """An exception's text in one line of 300 characters at most, or its type's name where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def working_on(what: str) -> Iterator[None]:
    """Notes on an error that nobody foresaw which clip it came from."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (PipelineError, Skip)):
            error.add_note(what)
        raise


def is_machines(error: object) -> bool:
    """Whether it is an error of the machine, not of what is being read: a file away, a disk, a limit, no memory."""
    number = error.errno if isinstance(error, OSError) else None
    return _lacks_memory(error) or (isinstance(number, int) and 0 < number <= LARGEST_ERRNO)


def _lacks_memory(error: object) -> bool:
    """Torch's errors are RuntimeErrors: on a GPU OutOfMemoryError, on a CPU nothing but the text tells."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and (
        _is_devices(error) or "DefaultCPUAllocator: can't allocate memory" in str(error)))


def _is_devices(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # by name, since importing torch takes seconds


_is_last: ContextVar[bool] = ContextVar("_is_last", default=True)


def is_last_attempt() -> bool:
    """Whether nothing will call this again: what may be the machine's fault or the file's then counts as the file's."""
    return _is_last.get()


def insist(call: Callable[[], T]) -> T:
    """What `call` returns, tried ATTEMPTS times while the machine is at fault. Raises what the last attempt raised."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    outside = _is_last.set(False)
    try:
        return Retrying(retry=retry_if_exception(is_machines), stop=stop_after_attempt(ATTEMPTS), reraise=True,
                        wait=wait_exponential(FIRST_WAIT),
                        before=lambda state: _is_last.set(state.attempt_number == ATTEMPTS) and None)(call)
    finally:
        _is_last.reset(outside)


def describe(error: BaseException) -> str:
    """A fault of the machine as the line that the user sees: the file, what is wrong, what to do."""
    notes = "".join(f"{note}: " for note in getattr(error, "__notes__", []))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}; {REMEDIES.get(error.errno or 0, OTHERWISE)}"
    elif _is_devices(error):
        text = "the device has no memory left; free some, or set runtime.device: cpu"
    else:
        text = "no memory left; free some, or lower runtime.workers or runtime.batch_memory_mb"
    return f"{notes}{text}, then run it again (what was finished is kept)"


def run_stage(main: Callable[..., None], *arguments: Any) -> None:
    """Run the main of a stage or a command.

    A PipelineError, or a fault of the machine, is one line on stderr and exit code 1. Ctrl-C is one line and exit code
    130. A reader that goes away (`| head`) ends it without a word and with 141, as SIGPIPE ends other programs. What a
    terminal's encoding can't show is shown escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with interrupts():
            try:
                main(*arguments)
            finally:
                sys.stdout.flush()  # here, where it can still be told from other errors that nobody reads it
    except PipelineError as error:
        text = str(error)
    except BrokenPipeError:
        if not nobody_reads():
            raise
        for stream in (sys.stdout, sys.stderr):  # what Python still writes at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        if not is_machines(error):
            raise
        text = describe(error)
    else:
        return
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(1)


def nobody_reads() -> bool:
    """Whether the reader of the standard output, or error, has gone away."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)  # POLLERR is always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))
