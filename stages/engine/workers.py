"""Worker processes that may crash or hang, as decoders of damaged clips do."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.engine.errors import ATTEMPTS, Died, PipelineError, Skip, insist, is_machines
from stages.engine.interrupts import uninterrupted

if TYPE_CHECKING:
    from pebble import ProcessPool

CHECK_SECONDS = 1.0  # between two looks at whether a task that has no result yet will ever have one


class _Task(NamedTuple):
    call: tuple[Any, ...]  # the function and its arguments
    pool: "ProcessPool"
    future: "Future[Any]"

    @property
    def lost(self) -> bool:
        """Whether its pool gave up before the task had a result."""
        if self.future.done():
            return isinstance(self.future.exception(), BrokenProcessPool)
        return not self.pool.active


class Workers:
    """Worker processes that may crash or hang: each such task costs itself alone, its worker is replaced (pebble).

    Pebble gives a pool up whose worker dies while none has a task: then another pool takes its place.
    """

    def __init__(self, count: int, timeout: float):
        self.count, self.timeout = count, timeout
        self._replaced = 0  # pools, since the last result
        self._begin_pool()

    def _begin_pool(self) -> None:
        from pebble import ProcessPool

        with uninterrupted():
            # spawn: a fork of a process with threads (HDF5, OpenMP) can dead-lock
            self._pool = ProcessPool(self.count, context=multiprocessing.get_context("spawn"))
            _ = self._pool.active  # begins its processes, and the threads that begin others

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in order; all tasks are submitted at once.

        In place of a result: Skip, where the function raised it; Died for a crash or time-out; the OSError or
        MemoryError of a machine at fault, after several attempts. Raises PipelineError where workers can't start.
        """
        return self._results(deque([self._schedule((function, *a)) for a in arguments]))

    def _schedule(self, call: tuple[Any, ...]) -> _Task:
        while True:
            try:
                return _Task(call, self._pool, self._pool.schedule(_patiently, call, timeout=self.timeout))
            except RuntimeError:  # the pool has given up
                self._replace_pool()

    def _replace_pool(self) -> None:
        self._replaced += 1
        if self._replaced > ATTEMPTS:
            raise PipelineError(NO_WORKERS)
        self.close()
        self._begin_pool()

    def _results(self, tasks: deque[_Task]) -> Iterator[Any]:
        from pebble import ProcessExpired

        while tasks:
            while not tasks[0].lost and not wait([tasks[0].future], CHECK_SECONDS).done:
                pass
            if tasks[0].lost:
                if tasks[0].pool is self._pool:
                    self._replace_pool()
                tasks = deque([self._schedule(task.call) if task.lost else task for task in tasks])
                continue
            try:
                yield tasks.popleft().future.result()
            except Skip as skip:
                yield skip
            except ProcessExpired as error:
                if error.exitcode >= 0:  # by itself: an import that failed, or what the clip made a library do
                    self._require_workers()
                yield Died(ended(error.exitcode))
            except (OSError, MemoryError) as error:
                if isinstance(error, TimeoutError) and not isinstance(error.errno, int):  # pebble's own
                    yield Died(f"stopped after {self.timeout:g} s (runtime.clip_timeout_seconds) without a result")
                elif is_machines(error):
                    yield error
                else:
                    raise
            self._replaced = 0

    def _require_workers(self) -> None:
        from pebble import ProcessExpired

        try:
            self._pool.schedule(_nothing).result()
        except ProcessExpired:
            raise PipelineError(NO_WORKERS) from None

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self._pool.stop()
        self._pool.join()


def _patiently(function: Callable[..., Any], *arguments: Any) -> Any:
    return insist(lambda: function(*arguments))


def _nothing() -> None:
    """What a worker that can begin at all can do."""


def ended(exit_code: int) -> str:
    """Why a worker that died did so."""
    if exit_code >= 0:
        return f"the decoder ended its process with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"the decoder crashed ({name}{', as when memory runs out' if name == 'SIGKILL' else ''})"


NO_WORKERS = ("decoding processes end before they can work (out of memory, or too many open files: ulimit -n); "
              "finished shards are kept, run dvc repro again")
