"""Worker processes that may crash or hang, as decoders of damaged clips do."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from stages.engine.errors import Skip


class Workers:
    """Worker processes that may crash or hang: each such task costs itself alone, its worker is replaced (pebble)."""

    def __init__(self, count: int, timeout: float):
        from pebble import ProcessPool

        self.timeout = timeout
        # spawn: a fork of a process with threads (HDF5, OpenMP) can dead-lock
        self._pool = ProcessPool(count, context=multiprocessing.get_context("spawn"))

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in order; all work is begun at once.

        In place of a result: Skip, whether raised by the function, or for a crash or time-out.
        """
        return self._results(deque(self._pool.schedule(function, a, timeout=self.timeout) for a in arguments))

    def _results(self, futures: deque[Any]) -> Iterator[Any]:
        from pebble import ProcessExpired

        while futures:
            try:
                yield futures.popleft().result()
            except Skip as skip:
                yield skip
            except TimeoutError:
                yield Skip(f"stopped after {self.timeout:g} s without a result")
            except ProcessExpired as error:
                yield Skip(f"the decoder crashed (exit code {error.exitcode})")

    def close(self) -> None:
        self._pool.close()
        self._pool.join()
