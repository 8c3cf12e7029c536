"""The two ways in which things go wrong.

PipelineError: the user must act; its text is one line that names the file or key, what was found
and what is expected. Skip: one clip can't be used; the reason is recorded and the run goes on.
"""

import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What the machine, not the program, must put right before the stage can go on
REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room")
REMEDIES |= {errno.EROFS: "make it writable"}
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM), "check its permissions")
REMEDIES |= dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), "check the disk or the network folder")
REMEDIES |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)")


class PipelineError(Exception):
    """Stops the stage; shown without a traceback, exit code 1."""


class Skip(Exception):
    """This clip can't be used; str(error) is the reason that reports/skipped.csv shows."""


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


def run_stage(main: Callable[..., None], *arguments: Any) -> None:
    """Run the main of a stage or a command; a PipelineError, or a file that can't be written, is one line on stderr and
    exit code 1; Ctrl-C is one line and exit code 130."""
    try:
        main(*arguments)
    except PipelineError as error:
        text = str(error)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        text = f"{error.filename or 'writing'}: {error.strerror}; {REMEDIES[error.errno]}, then run dvc repro again"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None  # the exit code that shells give it
    else:
        return
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(1)
