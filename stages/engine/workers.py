"""Worker processes that may crash or hang, as decoders of damaged clips do.

Each has a pipe of its own, and nothing is shared between them: no lock, no queue that one could leave locked or half
written (pools of libraries share both, and give up, or leave a process dead, where a worker ends without a task).
"""

import math
import multiprocessing
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.reduction import ForkingPickler  # between our own processes, as Connection.send does
from typing import Any, NamedTuple

from stages.engine.errors import ATTEMPTS, Died, PipelineError, Skip, insist, is_machines
from stages.engine.interrupts import interrupted, uninterrupted

CONTEXT = multiprocessing.get_context("spawn")  # a fork of a process with threads (HDF5, OpenMP) can dead-lock
HERE = b""  # what a worker says when it has started, and when it begins a task, whose doing its end then is
NO_WORKERS = ("decoding processes end before they can work (out of memory, or too many open files: ulimit -n); "
              "finished shards are kept, run dvc repro again")


def _dumps(value: Any) -> bytes:
    return bytes(ForkingPickler.dumps(value))


class _Task(NamedTuple):
    call: bytes  # the function and its arguments, pickled
    future: "Future[bytes]"  # of (result, None) or (None, error), pickled


class _Worker:
    """A process, and what is known of it."""

    def __init__(self) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        with theirs:
            self.process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
        self.ready = False  # it has started
        self.task: _Task | None = None
        self.deadline = math.inf  # by time.monotonic; finite once it has begun the task

    @property
    def at_work(self) -> bool:
        return self.deadline < math.inf

    def kill(self) -> None:
        """End it, and what it runs, OpenFace say."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            process.suspend()  # else it might begin another meanwhile
            for begun in process.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    begun.kill()
        self.process.kill()


class Workers:
    """Worker processes: one that crashes or hangs costs its task alone and is replaced, as is one that dies idle."""

    def __init__(self, count: int, timeout: float):
        self.timeout = timeout
        self._most_idle_ends, self._idle_ends = ATTEMPTS * count, 0  # of workers without a task, since the last result
        self._waiting: deque[_Task] = deque()
        self._woken, self._wake = CONTEXT.Pipe(duplex=False)  # a byte: there are tasks; its end: close
        with uninterrupted():  # the thread's processes, too
            self._workers = [_Worker() for _ in range(count)]
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in order; all tasks are submitted at once.

        In place of a result: Skip, where the function raised it; Died for a crash or time-out; the OSError or
        MemoryError of a machine at fault, after several attempts. Raises PipelineError where workers can't start.
        """
        tasks = [_Task(_dumps((function, a)), Future()) for a in arguments]
        self._waiting.extend(tasks)
        self._wake.send_bytes(b"1")
        return self._results(deque(task.future for task in tasks))

    def _results(self, futures: "deque[Future[bytes]]") -> Iterator[Any]:
        while futures:
            try:
                result, error = ForkingPickler.loads(futures.popleft().result())
            except Died as died:
                result, error = died, None
            if isinstance(error, Skip) or (error and is_machines(error)):
                yield error
            elif error:
                raise error
            else:
                yield result

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self._wake.close()
        self._thread.join()
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def _run(self) -> None:
        while True:
            for worker in self._workers:
                if worker.ready and not worker.task and self._waiting:
                    self._hand(worker, self._waiting.popleft())
            soonest = min((worker.deadline for worker in self._workers), default=math.inf)
            patience = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
            news = connection.wait([self._woken, *(worker.connection for worker in self._workers)], patience)
            # Idle ones first: who died before a task was submitted is replaced before that has a result
            for worker in sorted(self._workers, key=lambda worker: worker.at_work):
                if worker.connection in news:
                    self._hear(worker)
                elif worker.deadline <= time.monotonic():
                    worker.kill()
                    self._replace(worker, f"stopped after {self.timeout:g} s (runtime.clip_timeout_seconds) without "
                                          f"a result")
            if self._woken in news:
                try:
                    self._woken.recv_bytes()
                except EOFError:
                    return
            if self._idle_ends > self._most_idle_ends:
                while self._waiting:
                    self._waiting.popleft().future.set_exception(PipelineError(NO_WORKERS))

    def _hand(self, worker: _Worker, task: _Task) -> None:
        worker.task = task
        with suppress(OSError):  # it has just died, which its pipe will tell
            worker.connection.send_bytes(task.call)

    def _hear(self, worker: _Worker) -> None:
        try:
            said = worker.connection.recv_bytes()
        except (EOFError, OSError, MemoryError) as error:
            if not isinstance(error, EOFError):  # it may be alive
                worker.kill()
            self._replace(worker)
            return
        if said != HERE:
            assert worker.task
            worker.task.future.set_result(said)
            worker.task, worker.deadline, self._idle_ends = None, math.inf, 0
        elif worker.task:
            worker.deadline = time.monotonic() + self.timeout
        else:
            worker.ready = True

    def _replace(self, worker: _Worker, reason: str | None = None) -> None:
        """Another in its place, which ended for that reason, or for what its exit code says."""
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        if worker.task and worker.at_work:
            worker.task.future.set_exception(Died(reason or ended(worker.process.exitcode or 0)))
        else:
            self._idle_ends += 1
            if worker.task:
                self._waiting.appendleft(worker.task)
        if interrupted() or self._idle_ends > self._most_idle_ends:
            return
        try:
            self._workers.append(insist(_Worker))
        except (OSError, MemoryError):
            self._idle_ends = self._most_idle_ends + 1


def _serve(pipe: Any) -> None:
    """What a worker does until the program closes its end of the pipe, or ends."""
    with suppress(EOFError, ConnectionError):
        pipe.send_bytes(HERE)
        while True:
            pipe.send_bytes(_outcome(pipe.recv_bytes(), pipe))


def _outcome(call: bytes, pipe: Any) -> bytes:
    try:
        function, arguments = ForkingPickler.loads(call)  # may import a module, which is not the task's doing
        pipe.send_bytes(HERE)
        return _dumps((insist(lambda: function(*arguments)), None))
    except Exception as error:
        return _dumps((None, ExceptionWithTraceback(error, error.__traceback__)))


def ended(exit_code: int) -> str:
    """Why a worker that died did so."""
    if exit_code >= 0:
        return f"the decoder ended its process with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"the decoder crashed ({name}{', as when memory runs out' if name == 'SIGKILL' else ''})"
