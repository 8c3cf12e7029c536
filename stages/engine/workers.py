"""Worker processes that may crash or hang, as decoders of damaged clips do."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from stages.engine.errors import Died, PipelineError, Skip, insist, is_machines


class Workers:
    """Worker processes that may crash or hang: each such task costs itself alone, its worker is replaced (pebble)."""

    def __init__(self, count: int, timeout: float):
        from pebble import ProcessPool

        self.timeout = timeout
        # spawn: a fork of a process with threads (HDF5, OpenMP) can dead-lock
        self._pool = ProcessPool(count, context=multiprocessing.get_context("spawn"))

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in order; all tasks are submitted at once.

        In place of a result: Skip, where the function raised it; Died for a crash or time-out; the OSError or
        MemoryError of a machine at fault, after several attempts. Raises PipelineError where workers can't start.
        """
        tasks = [self._pool.schedule(_patiently, (function, *a), timeout=self.timeout) for a in arguments]
        return self._results(deque(tasks))

    def _results(self, futures: deque[Any]) -> Iterator[Any]:
        from pebble import ProcessExpired

        while futures:
            try:
                yield futures.popleft().result()
            except Skip as skip:
                yield skip
            except ProcessExpired as error:
                yield Died(ended(error.exitcode))
            except (OSError, MemoryError) as error:
                if isinstance(error, TimeoutError) and not isinstance(error.errno, int):  # pebble's own
                    yield Died(f"stopped after {self.timeout:g} s (runtime.clip_timeout_seconds) without a result")
                elif is_machines(error):
                    yield error
                else:
                    raise

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self._pool.stop()
        self._pool.join()


def _patiently(function: Callable[..., Any], *arguments: Any) -> Any:
    return insist(lambda: function(*arguments))


def ended(exit_code: int) -> str:
    """Why a worker that died did so. Raises PipelineError where it ended by itself: then no clip is the cause."""
    if exit_code >= 0:
        raise PipelineError(f"a decoding process ended with exit code {exit_code} before it could work (out of memory, "
                            f"or too many open files: ulimit -n); finished shards are kept, run dvc repro again")
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"the decoder crashed ({name}{', as when memory runs out' if name == 'SIGKILL' else ''})"
