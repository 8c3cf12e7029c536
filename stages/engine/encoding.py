"""Work of the engine that runs an encoder on a device: decoding ahead in threads, batching clips of like length."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from queue import SimpleQueue
from threading import Condition, Thread
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from stages.engine.devices import NARROW, batch_bytes, cores, free_bytes, lanes, pick_workers, set_threads
from stages.engine.errors import PipelineError, Skip, working_on
from stages.engine.extraction import Input
from stages.engine.params import Runtime
from stages.engine.store import Row, Store

T = TypeVar("T")
Batch = list[tuple[int, np.ndarray]]  # index of the clip, all or some of its prepared input
WINDOW_BYTES = 128 << 20  # prepared inputs that are sorted and batched together; fixed: timing changes no batch
AHEAD_BYTES = 128 << 20  # prepared inputs that wait while the device computes
CPU_BATCHES = 8  # of a window, for its cores; a fixed number, so that results do not depend on how many cores there are


class Encoder(Protocol):
    """What an encoder offers; see stages/encoders/hubert.py for the shortest.

    Its module also has a Config, a pydantic dataclass of the keys that a row of `extractors` may have besides encoder,
    input and keep_frames (checkpoint, revision and dtype among them), and Encoder(config, device).
    """

    dimension: int
    unit_bytes: int  # estimated peak activation bytes per unit of size in a batch
    padded: bool  # whether a batch's clips are padded to the longest; else any units (images) may be run together
    concurrent: bool  # whether several threads may call encode at once

    def prepare(self, item: Any) -> np.ndarray: ...

    def size(self, prepared: np.ndarray) -> int: ...

    def encode(self, batch: list[np.ndarray]) -> Sequence[Any]: ...


class Encode:
    """Encoder work. `make(device)` gives the encoder, `read(item)` a clip's input, `row(clip_id, output)` its row.

    `waited`: seconds for which the device had nothing to do but to wait for decoding.
    """

    def __init__(
        self,
        make: Callable[[str], Encoder],
        read: Callable[[Any], Any],
        row: Callable[[str, Any], Row],
        runtime: Runtime,
    ):
        self.make, self.read, self.row, self.runtime = make, read, row, runtime
        self.attributes: Mapping[str, Any] = {}
        self.waited = 0.0

    def open(self, device: str, workers: int | None = None) -> None:
        self._encoder = self.make(device)
        self.attributes = {"dimension": self._encoder.dimension}
        self._budget = batch_bytes(self.runtime, device)
        self._concurrent = device == "cpu" and self._encoder.concurrent
        self._threads = workers or pick_workers(self.runtime)

    def close(self) -> None:
        del self._encoder

    def shards(self, chunks: Iterable[Sequence[Input]]) -> Iterator[list[Row]]:
        with Ahead(self._prepare, chunks, self._threads) as ahead:
            for chunk in ahead:
                yield self._shard(chunk, ahead)
                self.waited = ahead.waited

    def _shard(self, chunk: Sequence[Input], ahead: "Ahead") -> list[Row]:
        rows: dict[str, Row] = {}
        window: list[tuple[str, np.ndarray]] = []
        held = 0
        for clip in chunk:
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
        return [rows[clip.clip_id] for clip in chunk]

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
        return {clip_id: self.row(clip_id, output) for (clip_id, _), output in zip(window, outputs, strict=True)}

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
            with working_on(f"a batch of clips {', '.join(dict.fromkeys(clips[i][0] for i, _ in batch))}"):
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
        """How many batches are computed side by side: no more than there are, and than memory has room for."""
        if not self._concurrent or len(todo) < 2:
            return 1
        largest = max(self._units([prepared for _, prepared in batch]) for batch in todo)
        room = free_bytes("cpu") // (largest * self._encoder.unit_bytes)
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
    """Chunks of clips, and each clip prepared by threads, in order.

    The threads stop while AHEAD_BYTES of results wait to be taken. They don't stop between chunks.
    """

    def __init__(self, prepare: Callable[[Input], Any], chunks: Iterable[Sequence[Input]], threads: int):
        self.waited = 0.0  # seconds, in take
        self._prepare, self._threads = prepare, threads
        self._queue: SimpleQueue[Any] = SimpleQueue()  # a chunk, a future for each of its clips, the next chunk ...
        self._changed = Condition()
        self._held, self._running, self._closed = 0, 0, False
        self._pool = ThreadPoolExecutor(threads)
        self._feeder = Thread(target=self._feed, args=(chunks,), daemon=True)

    def __enter__(self) -> "Ahead":
        self._feeder.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._feeder.join()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Sequence[Input]]:
        while (chunk := self._queue.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk

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

    def _feed(self, chunks: Iterable[Sequence[Input]]) -> None:
        try:
            for chunk in chunks:
                self._queue.put(chunk)
                for clip in chunk:
                    with self._changed:
                        self._changed.wait_for(self._may_go_on)
                        if self._closed:
                            return
                        self._running += 1
                    self._queue.put(self._pool.submit(self._run, clip))
            self._queue.put(None)
        except BaseException as error:  # of `chunks`: raised where they are wanted
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


class StoreReader:
    """Reads a clip's item from a store; one per process, opened on first use."""

    def __init__(self, folder: str):
        self.folder = folder
        self._store: Store | None = None

    def __call__(self, clip_id: str) -> Any:
        store = self._store = self._store or Store(self.folder)
        value = store.read(clip_id)
        return (value, int(store.attrs["sample_rate"])) if store.kind == "audio" else value


def identity(item: Any) -> Any:
    """Reads what is an encoder's input already."""
    return item


def store_inputs(folder: str) -> list[Input]:
    """A store's clips, in order; each one's item is its id, for a StoreReader."""
    store = Store(folder)
    return [
        Input(clip_id, clip_id, digest, absent=not present)
        for clip_id, digest, present in zip(store.clip_ids, store.digests, store.present, strict=True)
    ]


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
