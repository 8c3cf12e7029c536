"""The engine's executors on this machine: one process, or one for each of several devices."""

import multiprocessing
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from stages.engine.devices import pick_workers
from stages.engine.errors import PipelineError
from stages.engine.interrupts import uninterrupted
from stages.engine.params import Params
from stages.engine.work import Shard, Target, Work, write_shards

POLL_SECONDS = 0.5


def compute(
    todo: Sequence[Shard], work: Work, target: Target, params: Params, devices: Sequence[str]
) -> Iterator[Any]:
    """Yield None once the work is open, then each shard as it is done."""
    if not todo:
        return
    if params.runtime.executor == "ray":
        from stages.engine.ray_executor import compute_in_ray

        yield from compute_in_ray(todo, work, target, params, gpu=[*devices] != ["cpu"])
        return
    if len(devices) > 1 and len(todo) > 1:
        yield None
        workers = max(1, pick_workers(params.runtime) // len(devices))
        yield from _in_processes(todo, work, target, devices, workers)
        return
    work.open(devices[0])
    try:
        yield None
        yield from write_shards(todo, work, target)
    finally:
        work.close()


def _in_processes(
    todo: Sequence[Shard], work: Work, target: Target, devices: Sequence[str], workers: int
) -> Iterator[Shard]:
    """One process per device; the shards are in one queue, so a fast device does more of them."""
    context = multiprocessing.get_context("spawn")
    shards, done = context.Queue(), context.Queue()
    for number in [*range(len(todo)), *[None] * len(devices)]:
        shards.put(number)
    with ProcessPoolExecutor(len(devices), context, _set_queues, (shards, done)) as pool:
        with uninterrupted():
            processes = [pool.submit(_work_on_device, todo, work, target, device, workers) for device in devices]
        try:
            for _ in todo:
                while True:
                    try:
                        yield todo[done.get(timeout=POLL_SECONDS)]
                        break
                    except queue.Empty:
                        for process in processes:
                            if process.done():
                                process.result()  # raises what ended it
        except BrokenProcessPool:
            raise PipelineError(
                f"{target.stage}: a device's process was ended from outside (out of memory?); finished shards are "
                f"kept, run dvc repro again"
            ) from None
        finally:
            _empty(shards)  # after an error the other processes end with the shards that they have begun


def _empty(shards: Any) -> None:
    """Remove all items from the queue but the Nones."""
    try:
        while shards.get_nowait() is not None:
            pass
        shards.put(None)
    except queue.Empty:
        pass


_shards: Any  # of a device process: the queues that it shares with the others
_done: Any


def _set_queues(shards: Any, done: Any) -> None:
    global _shards, _done
    _shards, _done = shards, done


def _work_on_device(todo: Sequence[Shard], work: Work, target: Target, device: str, workers: int) -> None:
    numbers = {shard.part: number for number, shard in enumerate(todo)}
    work.open(device, workers)
    try:
        for shard in write_shards((todo[number] for number in iter(_shards.get, None)), work, target):
            _done.put(numbers[shard.part])
    finally:
        work.close()
