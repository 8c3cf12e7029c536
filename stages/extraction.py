"""The extraction engine: plan shards, skip the done ones, compute the others, finalise.

A stage hands over its clips (with a digest of each clip's input) and a Work that turns clips into rows.
Every finished shard is a file .cache/parts/<stage>/<fingerprint>/<digest of its clips>.h5, written whole or
not at all; existence means done. So a run that is killed loses at most one shard, going back to an old
parameter finds the old shards, and a stale shard can't be picked up: the fingerprint covers the stage's
tracked params, the bytes of its declared code and its checkpoint, the file name the clips' inputs.

Two kinds of work: PerClip (media: one function per clip in worker processes that may crash or hang) and
Encode (an encoder on one device, decoding ahead in threads, batching clips of like length).
"""

import hashlib
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from stages.corpus.manifest import read_manifest, write_rows
from stages.errors import PipelineError, Skip
from stages.files import empty_folder, replacing
from stages.fingerprint import stage_fingerprint
from stages.params import Params, Runtime
from stages.store import Row, Store, check_shard, feature_row, present_and_reasons, write_index, write_shard

T = TypeVar("T")
PARTS = Path(".cache/parts")
WINDOW_BYTES = 256 << 20  # prepared inputs held at once; fixed, because it decides which clips share a batch
REASONS_SHOWN = 10
NARROW = 256  # features; the smallest published encoders have 512


@dataclass(frozen=True)
class Input:
    """One clip as a stage sees it: `item` locates or holds its input, `digest` identifies the input's content."""

    clip_id: str
    item: Any
    digest: bytes
    absent: bool = False  # upstream has nothing for this clip, and recorded why


class Work(Protocol):
    """Turns clips into rows, in order. Picklable; heavy parts are made in `open`, once per device process.

    `attributes` (known once open) join the shards' own.
    """

    attributes: Mapping[str, Any]

    def open(self, device: str) -> None: ...

    def rows(self, inputs: Sequence[Input]) -> Iterator[Row]: ...

    def close(self) -> None: ...


# ---------------------------------------------------------------- running a stage


@dataclass(frozen=True)
class Stage:
    """A stage that writes a store: its name in dvc.yaml, out folder, kind of store and shard attributes."""

    name: str
    out: Path
    kind: str
    attributes: Mapping[str, Any]
    fingerprint: str


def extract(stage: Stage, inputs: Sequence[Input], work: Work, params: Params, devices: Sequence[str]) -> None:
    """Write the stage's store, resuming from finished shards.

    Raises PipelineError if more than corpus.max_bad_fraction of the clips came out absent here (clips that were
    already absent upstream do not count).
    """
    parts = _plan(stage, inputs, params.corpus.shard_size)
    todo = [(part, chunk) for part, chunk in parts if not _is_done(part, stage)]
    done = len(inputs) - sum(len(chunk) for _, chunk in todo)
    finished = _compute(todo, work, stage, devices)
    next(finished, None)  # what is wrong with the work itself is said before a bar is drawn
    with tqdm(total=len(inputs), initial=done, desc=stage.name, unit="clip", mininterval=1, disable=not todo) as bar:
        for count in finished:
            bar.update(count)
    _check_bad_fraction(stage, inputs, [part for part, _ in parts], params.corpus.max_bad_fraction)
    _finalise(stage.out, [part for part, _ in parts], params.runtime.keep_parts)


def _plan(stage: Stage, inputs: Sequence[Input], shard_size: int) -> list[tuple[Path, Sequence[Input]]]:
    folder = PARTS / stage.name / stage.fingerprint
    chunks = [inputs[i : i + shard_size] for i in range(0, len(inputs), shard_size)]
    return [(folder / f"{_rows_digest(chunk)}.h5", chunk) for chunk in chunks]


def _part_fingerprint(part: Path, stage: Stage) -> str:
    return f"{stage.fingerprint}-{part.stem}"


def _is_done(part: Path, stage: Stage) -> bool:
    """Whether the part exists. One that the disk has damaged since is removed: linked into the out, it would spread."""
    if not part.exists():
        return False
    try:
        check_shard(part, _part_fingerprint(part, stage))
    except PipelineError as error:
        print(f"{stage.name}: {error}; it is made again", file=sys.stderr)
        part.unlink()
    return part.exists()


def _rows_digest(chunk: Sequence[Input]) -> str:
    content = hashlib.blake2b(digest_size=16)
    for clip in chunk:
        name = clip.clip_id.encode()
        content.update(len(name).to_bytes(4, "little") + name + clip.digest + bytes([clip.absent]))
    return content.hexdigest()


def _compute(
    todo: list[tuple[Path, Sequence[Input]]], work: Work, stage: Stage, devices: Sequence[str]
) -> Iterator[int]:
    """Yield 0 once the work is open, then the number of clips of each shard as it is done.

    One process per device where there are several.
    """
    if not todo:
        return
    if len(devices) == 1 or len(todo) == 1:
        work.open(devices[0])
        try:
            yield 0
            for part, chunk in todo:
                yield _write(part, chunk, work, stage)
        finally:
            work.close()
        return
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    yield 0
    with ProcessPoolExecutor(len(devices), context, _open_worker, (work, free)) as pool:
        yield from pool.map(partial(_write_in_worker, stage=stage), *zip(*todo, strict=True))


def _write(part: Path, chunk: Sequence[Input], work: Work, stage: Stage) -> int:
    # The shard's number is not part of its bytes: it may change when the corpus grows.
    attributes = {**stage.attributes, **work.attributes, "fingerprint": _part_fingerprint(part, stage)}
    write_shard(part, stage.kind, list(work.rows(chunk)), attributes)
    return len(chunk)


_worker_work: Work  # one per device process


def _open_worker(work: Work, free: Any) -> None:
    global _worker_work
    _worker_work = work
    work.open(free.get())


def _write_in_worker(part: Path, chunk: Sequence[Input], stage: Stage) -> int:
    return _write(part, chunk, _worker_work, stage)


def _check_bad_fraction(stage: Stage, inputs: Sequence[Input], parts: Sequence[Path], limit: float) -> None:
    known = {clip.clip_id for clip in inputs if clip.absent}
    bad = [(c, r) for part in parts for c, ok, r in present_and_reasons(part) if not ok and c not in known]
    if len(bad) <= limit * len(inputs):
        return
    listing = Path(".cache") / f"skipped-{stage.name}.csv"
    write_rows(listing, ["clip_id", "reason"], bad)
    shown = "; ".join(f"{clip_id}: {reason}" for clip_id, reason in bad[:REASONS_SHOWN])
    raise PipelineError(
        f"{stage.name}: {len(bad)} of {len(inputs)} clips can't be used, more than corpus.max_bad_fraction "
        f"= {limit} allows; all in {listing}; {shown}{' ...' if len(bad) > REASONS_SHOWN else ''}"
    )


def _finalise(out: Path, parts: Sequence[Path], keep_parts: bool) -> None:
    """Link (or, across file systems, copy) the parts into the out folder; nothing is ever written through a link."""
    empty_folder(out)
    names = [f"shard-{i:05d}.h5" for i in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        try:
            os.link(part, out / name)
        except OSError:
            with open(part, "rb") as source, replacing(out / name, "wb") as target:
                shutil.copyfileobj(source, target)
    write_index(out, names)
    if not keep_parts and parts:
        shutil.rmtree(parts[0].parent)


# ---------------------------------------------------------------- per-clip work in processes (media)


def extract_media(name: str, out: Path, kind: str, function: Callable[[str, str], Row], params: Params,
                  attributes: Mapping[str, Any]) -> None:
    """Write a media store: `function(clip_id, path) -> Row` over the manifest's clips, in worker processes."""
    root = Path(params.corpus.path)
    inputs = [Input(c.clip_id, str(root / c.path), bytes.fromhex(c.digest)) for c in read_manifest()]
    stage = Stage(name, out, kind, attributes, stage_fingerprint(name))
    runtime = params.runtime
    extract(stage, inputs, PerClip(function, pick_workers(runtime), runtime.clip_timeout_seconds), params, ["cpu"])


class PerClip:
    """Media work: `function(clip_id, item) -> Row` in worker processes.

    A clip whose decoder crashes or takes longer than `timeout` seconds costs that clip alone and is recorded.
    `function` raises Skip(reason) for a clip it can't use.
    """

    def __init__(self, function: Callable[[str, Any], Row], workers: int, timeout: float):
        self.function, self.workers, self.timeout = function, workers, timeout
        self.attributes: Mapping[str, Any] = {}

    def open(self, device: str) -> None:
        self._pool = Workers(self.workers, self.timeout)

    def close(self) -> None:
        self._pool.close()

    def rows(self, inputs: Sequence[Input]) -> Iterator[Row]:
        present = [(clip.clip_id, clip.item) for clip in inputs if not clip.absent]
        results = self._pool.map(self.function, present)
        for clip in inputs:
            result = Row(clip.clip_id) if clip.absent else next(results)
            yield Row(clip.clip_id, reason=str(result)) if isinstance(result, Skip) else result


class Workers:
    """Worker processes that may crash or hang: each such task costs itself alone, its worker is replaced (pebble)."""

    def __init__(self, count: int, timeout: float):
        from pebble import ProcessPool

        self.timeout = timeout
        # spawn: a fork of a process with threads (HDF5, OpenMP) can dead-lock
        self._pool = ProcessPool(count, context=multiprocessing.get_context("spawn"))

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in order. In place of a result: Skip, whether raised by the function, or for a crash or time-out."""
        from pebble import ProcessExpired

        futures = deque(self._pool.schedule(function, a, timeout=self.timeout) for a in arguments)
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


# ---------------------------------------------------------------- encoders on a device


class Encoder(Protocol):
    """What an encoder offers; see stages/encoders/hubert.py for the shortest."""

    dimension: int
    unit_bytes: int  # estimated peak activation bytes per unit of size in a batch

    def prepare(self, item: Any) -> np.ndarray: ...

    def size(self, prepared: np.ndarray) -> int: ...

    def encode(self, batch: list[np.ndarray]) -> list[np.ndarray]: ...


class Encode:
    """Encoder work: read and prepare ahead in threads, batch clips of like length, pool over time."""

    def __init__(
        self,
        make: Callable[[str], Encoder],
        read: Callable[[Any], Any],
        *,
        keep_frames: bool,
        variance: bool,
        threads: int,
        batch_bytes: int | None,
    ):
        self.make, self.read = make, read
        self.keep_frames, self.variance = keep_frames, variance
        self.threads, self.batch_bytes = threads, batch_bytes
        self.attributes: Mapping[str, Any] = {}

    def open(self, device: str) -> None:
        self._encoder = self.make(device)
        set_threads(self._encoder.dimension < NARROW)
        self.attributes = {"dimension": self._encoder.dimension, "variance": self.variance}
        self._budget = self.batch_bytes or default_batch_bytes(device)
        self._threads = ThreadPoolExecutor(self.threads)

    def close(self) -> None:
        self._threads.shutdown()

    def rows(self, inputs: Sequence[Input]) -> Iterator[Row]:
        rows: dict[str, Row] = {}
        window: list[tuple[Input, np.ndarray]] = []
        held = 0
        for clip, prepared in self._prepare_ahead(inputs):
            if not isinstance(prepared, np.ndarray):
                rows[clip.clip_id] = Row(clip.clip_id, reason=prepared)
                continue
            window.append((clip, prepared))
            held += prepared.nbytes
            if held >= WINDOW_BYTES:
                rows.update(self._encode(window))
                window, held = [], 0
        rows.update(self._encode(window))
        return iter([rows[clip.clip_id] for clip in inputs])

    def _prepare_ahead(self, inputs: Sequence[Input]) -> Iterator[tuple[Input, np.ndarray | str]]:
        """Clips in order, each with its prepared input or the reason why there is none."""
        ahead: deque[tuple[Input, Future[np.ndarray | str]]] = deque()
        for clip in inputs:
            ahead.append((clip, self._threads.submit(self._prepare, clip)))
            if len(ahead) > 2 * self.threads:
                first, future = ahead.popleft()
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()

    def _prepare(self, clip: Input) -> np.ndarray | str:
        if clip.absent:
            return ""
        try:
            return self._encoder.prepare(self.read(clip.item))
        except Skip as skip:
            return str(skip)

    def _encode(self, window: list[tuple[Input, np.ndarray]]) -> dict[str, Row]:
        rows = {}
        for batch in batches(window, lambda pair: self._encoder.size(pair[1]), self._encoder.unit_bytes, self._budget):
            features = self._encoder.encode([prepared for _, prepared in batch])
            for (clip, _), sequence in zip(batch, features, strict=True):
                rows[clip.clip_id] = self._row(clip.clip_id, sequence)
        return rows

    def _row(self, clip_id: str, sequence: np.ndarray) -> Row:
        if not np.isfinite(sequence).all():
            return Row(clip_id, reason="the encoder returned non-finite features; try dtype: float32")
        return feature_row(clip_id, sequence, self.keep_frames, self.variance)


class StoreReader:
    """Reads a clip's item from a store; one per process, opened on first use."""

    def __init__(self, folder: str):
        self.folder = folder
        self._store: Store | None = None

    def __call__(self, clip_id: str) -> Any:
        store = self._store = self._store or Store(self.folder)
        value = store.read(clip_id)
        return (value, int(store.attrs["sample_rate"])) if store.kind == "audio" else value


def store_inputs(folder: str) -> list[Input]:
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


# ---------------------------------------------------------------- the machine


def pick_devices(device: str) -> list[str]:
    """`auto`: every GPU, or the CPU; `cuda`: every GPU. Raises PipelineError where the GPU asked for is not there."""
    if device == "cpu":
        return ["cpu"]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return [f"cuda:{i}" for i in range(count)] or ["cpu"]
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise PipelineError(
            f"params.yaml: runtime.device: found {device}, but this machine has {count} usable GPUs; "
            f"expected auto, cpu{''.join(f', cuda:{i}' for i in range(count))}"
        )
    return [device] if ":" in device else [f"cuda:{i}" for i in range(count)]


def pick_device(device: str) -> str:
    """The one device of a stage that uses one: the first of pick_devices."""
    return pick_devices(device)[0]


def pick_workers(runtime: Runtime) -> int:
    """Decoding workers: runtime.workers, or the cores this process may use."""
    return len(os.sched_getaffinity(0)) if runtime.workers == "auto" else runtime.workers


def set_threads(narrow: bool) -> None:
    """On a CPU, one thread for a narrow network, else all cores.

    Threads meet after every operation. Where an operation takes microseconds they only wait for one another, ten
    times as long as they compute when anything else runs on the machine.
    """
    import torch

    torch.set_num_threads(1 if narrow else len(os.sched_getaffinity(0)))


def default_batch_bytes(device: str) -> int:
    """Half of a GPU's free memory; on a CPU little: there computing binds, and padding only costs."""
    if not device.startswith("cuda"):
        return 64 << 20
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free // 2
