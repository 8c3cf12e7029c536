"""Work of the engine that runs an encoder on a device: decoding ahead in threads, batching clips of like length."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Thread
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from stages.engine.devices import (
    NARROW,
    batch_bytes,
    cores,
    device_name,
    lane_bytes,
    lanes,
    pick_workers,
    set_threads,
)
from stages.engine.errors import PipelineError, Skip, working_on
from stages.engine.params import Runtime
from stages.engine.store import Row
from stages.engine.versions import ENCODERS, versions
from stages.engine.work import Input, Shard

T = TypeVar("T")
Batch = list[tuple[int, np.ndarray]]  # index of the clip, all or some of its prepared input
WINDOW_BYTES = 128 << 20  # prepared inputs that are sorted and batched together; fixed: timing changes no batch
AHEAD_BYTES = 128 << 20  # prepared inputs that wait while the device computes
RECORDED = {"dimension": 0, "variance": True, "folds": 1, "leaky": False}  # of an encoder, with what most have
CPU_BATCHES = 8  # of a window, for its cores; a fixed number, so that results do not depend on how many cores there are


class Encoder(Protocol):
    """What an encoder offers; see stages/encoders/hubert.py for the shortest.

    Its module also has a Config, a pydantic dataclass of the keys that a row of `extractors` may have besides encoder,
    input, depends_on and keep_frames (checkpoint, revision and dtype among them), and Encoder(config, device). What
    RECORDED names may be given otherwise: `variance`, whether the variance over time is a feature; `folds`, how many
    vectors of `dimension` a frame has, one for each fold; `leaky`, whether it has learned from every fold's labels.
    """

    dimension: int
    unit_bytes: int  # estimated peak activation bytes per unit of size in a batch
    padded: bool  # whether a batch's clips are padded to the longest; else any units (images) may be run together
    concurrent: bool  # whether several threads may call encode at once

    def prepare(self, item: Any) -> np.ndarray: ...

    def size(self, prepared: np.ndarray) -> int: ...

    def encode(self, batch: list[np.ndarray]) -> Sequence[Any]: ...


class Encode:
    """Encoder work: `make(device)` gives the encoder, `read(item)` a clip's input, `row(encoder, clip_id, output)` its
    row.

    `waited`: seconds for which the device had nothing to do but to wait for decoding.
    """

    def __init__(
        self,
        make: Callable[[str], Encoder],
        read: Callable[[Any], Any],
        row: Callable[[Any, str, Any], Row],
        runtime: Runtime,
    ):
        self.make, self.read, self.row, self.runtime = make, read, row, runtime
        self.attributes: Mapping[str, Any] = {}
        self.waited = 0.0

    def open(self, device: str, workers: int | None = None) -> None:
        self._encoder = self.make(device)
        recorded = {name: getattr(self._encoder, name, value) for name, value in RECORDED.items()}
        self.attributes = {"device": device_name(device), "versions": versions(ENCODERS), **recorded}
        self._budget = batch_bytes(self.runtime, device)
        self._concurrent = device == "cpu" and self._encoder.concurrent
        self._threads = workers or pick_workers(self.runtime)

    def close(self) -> None:
        del self._encoder

    def shards(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, list[Row]]]:
        with Ahead(self._prepare, shards, self._threads) as ahead:
            for shard in ahead:
                yield shard, self._rows(shard.clips, ahead)
                self.waited = ahead.waited

    def rows(self, clips: Sequence[Input]) -> list[Row]:
        """The rows of these clips, outside of any store."""
        ((_, rows),) = self.shards([Shard(Path(), clips)])
        return rows

    def _rows(self, clips: Sequence[Input], ahead: "Ahead") -> list[Row]:
        rows: dict[str, Row] = {}
        window: list[tuple[str, np.ndarray]] = []
        held = 0
        for clip in clips:
            prepared = ahead.take()
            if not isinstance(prepared, np.ndarray):
                rows[clip.clip_id] = Row(clip.clip_id, reason=prepared)
                continue
            window.append((clip.clip_id, prepared))
            held += prepared.nbytes
            if held >= WINDOW_BYTES:
                rows.update(self._encode(window))
                window, held = [], 0
        rows.update(self._encode(window))
        return [rows[clip.clip_id] for clip in clips]

    def _prepare(self, clip: Input) -> np.ndarray | str:
        """The prepared input, or the reason why there is none."""
        if clip.absent:
            return ""
        try:
            with working_on(f"clip {clip.clip_id}"):
                return self._encoder.prepare(self.read(clip.item))
        except Skip as skip:
            return str(skip)

    def _encode(self, window: list[tuple[str, np.ndarray]]) -> dict[str, Row]:
        outputs = self._outputs(window)
        return {
            clip_id: self.row(self._encoder, clip_id, output)
            for (clip_id, _), output in zip(window, outputs, strict=True)
        }

    def _outputs(self, clips: list[tuple[str, np.ndarray]]) -> list[Any]:
        """The encoder's output for each (clip_id, prepared), in order."""
        set_threads(self._encoder.dimension < NARROW)  # here, since a process may hold encoders of both kinds
        parts: list[list[Any]] = [[] for _ in clips]
        budget = self._budget
        todo = list(self._batches(clips))
        count = self._lane_count(todo)
        with lanes(count) if count > 1 else nullcontext() as pool:
            run = pool.map if pool else map  # a device's batches one after another, each with all of its memory
            for batch, found in zip(todo, run(partial(self._attempt, clips), todo), strict=True):
                if found is None:  # out of memory
                    if self._budget == budget:  # else an earlier batch of these has halved it
                        self._halve_budget(clips[batch[0][0]][0], [prepared for _, prepared in batch])
                    found = self._outputs([(clips[i][0], prepared) for i, prepared in batch])
                for (i, _), output in zip(batch, found, strict=True):
                    parts[i].append(output)
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def _attempt(self, clips: list[tuple[str, np.ndarray]], batch: Batch) -> Sequence[Any] | None:
        """The encoder's outputs for a batch; None where the device's memory is too small for it."""
        from torch import OutOfMemoryError

        try:
            with working_on(f"a batch of {len(batch)} clips, {clips[batch[0][0]][0]} first"):
                return self._encoder.encode([prepared for _, prepared in batch])
        except OutOfMemoryError:
            return None

    def _batches(self, clips: list[tuple[str, np.ndarray]]) -> Iterator[Batch]:
        """The clips in batches that fit the budget, and on a CPU in enough of them to keep cores busy."""
        encoder, budget = self._encoder, self._budget
        if self._concurrent:
            units = sum(encoder.size(prepared) for _, prepared in clips)
            budget = min(budget, -(-units * encoder.unit_bytes // CPU_BATCHES))
        if encoder.padded:
            indexed = [(i, prepared) for i, (_, prepared) in enumerate(clips)]
            return batches(indexed, lambda pair: encoder.size(pair[1]), encoder.unit_bytes, budget)
        return runs([prepared for _, prepared in clips], max(1, budget // encoder.unit_bytes))

    def _lane_count(self, todo: Sequence[Batch]) -> int:
        """How many batches are computed side by side: no more than there are, and than memory has room for.

        That is all that runtime.batch_memory_mb decides on a CPU: which clips share a batch it does not change.
        """
        if not self._concurrent or len(todo) < 2:
            return 1
        largest = max(self._units([prepared for _, prepared in batch]) for batch in todo)
        room = lane_bytes(self.runtime) // (largest * self._encoder.unit_bytes)
        return max(1, min(cores(), len(todo), room))

    def _units(self, batch: Sequence[np.ndarray]) -> int:
        """What a batch takes, padding included."""
        sizes = [self._encoder.size(prepared) for prepared in batch]
        return len(sizes) * max(sizes) if self._encoder.padded else sum(sizes)

    def _halve_budget(self, first_clip: str, batch: list[np.ndarray]) -> None:
        """Smaller batches from now on. PipelineError where one clip, or one image, is already too much."""
        import torch

        encoder, units = self._encoder, self._units(batch)
        if len(batch) == 1 and (encoder.padded or units == 1):
            raise PipelineError(
                f"clip {first_clip}: the device's memory is too small for {units} samples, tokens or images at "
                f"once; use a half-precision dtype, or runtime.device: cpu"
            )
        self._budget = min(self._budget, units * encoder.unit_bytes) // 2
        torch.cuda.empty_cache()


class Ahead:
    """Shards, and each of their clips prepared by threads, in order.

    The threads stop while AHEAD_BYTES of results wait to be taken. They don't stop between shards.
    """

    def __init__(self, prepare: Callable[[Input], Any], shards: Iterable[Shard], threads: int):
        self.waited = 0.0  # seconds, in take
        self._prepare, self._threads = prepare, threads
        self._queue: SimpleQueue[Any] = SimpleQueue()  # a shard, a future for each of its clips, the next shard ...
        self._changed = Condition()
        self._held, self._running, self._closed = 0, 0, False
        self._pool = ThreadPoolExecutor(threads)
        self._feeder = Thread(target=self._feed, args=(shards,), daemon=True)

    def __enter__(self) -> "Ahead":
        self._feeder.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._feeder.join()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Shard]:
        while (shard := self._queue.get()) is not None:
            if isinstance(shard, BaseException):
                raise shard
            yield shard

    def take(self) -> Any:
        """The next clip's result; raises what preparing it raised."""
        start = time.perf_counter()
        future: Future[Any] = self._queue.get()
        result = future.result()
        self.waited += time.perf_counter() - start
        with self._changed:
            self._held -= getattr(result, "nbytes", 0)
            self._changed.notify_all()
        return result

    def _feed(self, shards: Iterable[Shard]) -> None:
        try:
            for shard in shards:
                self._queue.put(shard)
                for clip in shard.clips:
                    with self._changed:
                        self._changed.wait_for(self._may_go_on)
                        if self._closed:
                            return
                        self._running += 1
                    self._queue.put(self._pool.submit(self._run, clip))
            self._queue.put(None)
        except BaseException as error:  # of `shards`: raised in the thread that takes them
            self._queue.put(error)

    def _may_go_on(self) -> bool:
        return self._closed or (self._running < 2 * self._threads and self._held < AHEAD_BYTES)

    def _run(self, clip: Input) -> Any:
        result = None
        try:
            result = self._prepare(clip)
        finally:
            with self._changed:
                self._running -= 1
                self._held += getattr(result, "nbytes", 0)
                self._changed.notify_all()
        return result


def batches(items: Sequence[T], size: Callable[[T], int], unit_bytes: int, budget: int) -> Iterator[list[T]]:
    """Longest first, so that memory peaks at once; each batch's padded size fits the budget, or it is one clip."""
    batch: list[T] = []
    longest = 0
    for item in sorted(items, key=size, reverse=True):
        if batch and (len(batch) + 1) * longest * unit_bytes > budget:
            yield batch
            batch = []
        if not batch:
            longest = size(item)
        batch.append(item)
    if batch:
        yield batch


def runs(arrays: Sequence[np.ndarray], count: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Batches of `count` rows in all, as (index of the array, a run of its rows); only the last has fewer."""
    batch: list[tuple[int, np.ndarray]] = []
    room = count
    for index, array in enumerate(arrays):
        start = 0
        while start < len(array):
            piece = array[start : start + room]
            batch.append((index, piece))
            start += len(piece)
            room -= len(piece)
            if not room:
                yield batch
                batch, room = [], count
    if batch:
        yield batch
