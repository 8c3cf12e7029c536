"""The two ways in which things go wrong.

PipelineError: the user must act; its text is one line that names the file or key, what was found
and what is expected. Skip: one clip can't be used; the reason is recorded and the run goes on.
"""

import sys
from collections.abc import Callable


class PipelineError(Exception):
    """Stops the stage; shown without a traceback, exit code 1."""


class Skip(Exception):
    """This clip can't be used; str(error) is the reason that reports/skipped.csv shows."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main; a PipelineError becomes one line on stderr and exit code 1."""
    try:
        main()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
