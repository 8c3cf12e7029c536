"""The extraction engine: plan shards, skip the done ones, compute the others, finalise.

A stage hands over its clips (with a digest of each clip's input) and a Work that turns clips into rows.
Every finished shard is a file .cache/parts/<stage>/<fingerprint>/<digest of its clips>.h5, written whole or
not at all; existence means done. So a run that is killed loses at most one shard, going back to an old
parameter finds the old shards, and a stale shard can't be picked up: the fingerprint covers the stage's
tracked params, the bytes of its declared code and its checkpoint, the file name the clips' inputs.

There are two kinds of Work: stages/engine/per_clip.py (media: one function per clip in worker processes that may crash
or hang) and stages/engine/encoding.py (an encoder on one device). With several devices each has its own process, and
all take shards from one queue; with runtime.executor: ray the nodes of a cluster do (stages/engine/ray_executor.py).
"""

import hashlib
import multiprocessing
import os
import queue
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from stages.engine.devices import pick_workers
from stages.engine.errors import PipelineError
from stages.engine.files import empty_folder, replacing, write_rows
from stages.engine.fingerprint import PARTS
from stages.engine.params import Params
from stages.engine.store import Row, read_head, write_index, write_shard

REASONS_SHOWN = 10
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Input:
    """One clip as a stage sees it: `item` locates or holds its input, `digest` identifies the input's content."""

    clip_id: str
    item: Any
    digest: bytes
    absent: bool = False  # upstream has nothing for this clip, and recorded why


class Work(Protocol):
    """Turns chunks of clips into rows. Picklable; heavy parts are made in `open`, once per device process.

    `shards` gives each chunk's rows, in order; it may take chunks ahead of those it gives back. `attributes`
    (known once open) join the shards' own. `workers`: how many may decode at once, None = runtime.workers.
    """

    attributes: Mapping[str, Any]

    def open(self, device: str, workers: int | None = None) -> None: ...

    def shards(self, chunks: Iterable[Sequence[Input]]) -> Iterator[list[Row]]: ...

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
    heads = {part: head for part, _ in parts if (head := _head_if_done(part, stage)) is not None}
    todo = [(part, chunk) for part, chunk in parts if part not in heads]
    done = len(inputs) - sum(len(chunk) for _, chunk in todo)
    finished = _compute(todo, work, stage, params, devices)
    next(finished, None)  # what is wrong with the work itself is said before a bar is drawn
    with tqdm(total=len(inputs), initial=done, desc=stage.name, unit="clip", mininterval=1, disable=not todo) as bar:
        for count in finished:
            bar.update(count)
    heads |= {part: read_head(part, part_fingerprint(stage.fingerprint, part)) for part, _ in todo}
    rows = [row for part, _ in parts for row in heads[part]]
    _check_bad_fraction(stage, inputs, rows, params.corpus.max_bad_fraction)
    _finalise(stage, [part for part, _ in parts], params.runtime.keep_parts)


Shard = tuple[Path, Sequence[Input]]  # where it is written, and its clips
Head = tuple[str, bool, str]  # of a clip in a finished shard: its id, whether present, the reason if not


def _plan(stage: Stage, inputs: Sequence[Input], shard_size: int) -> list[Shard]:
    folder = PARTS / stage.name / stage.fingerprint
    chunks = [inputs[i : i + shard_size] for i in range(0, len(inputs), shard_size)]
    return [(folder / f"{_rows_digest(chunk)}.h5", chunk) for chunk in chunks]


def part_fingerprint(fingerprint: str, part: Path) -> str:
    """What a part of a stage with this fingerprint carries: its stage's and its clips'."""
    return f"{fingerprint}-{part.stem}"


def _head_if_done(part: Path, stage: Stage) -> list[Head] | None:
    """What the part says of its clips, or None where it does not exist.

    One that is visibly not what it should be is removed: in the out, it would spread. Only its head is read: of 120,000
    clips the parts are tens of gigabytes. Damage further in is found by whoever reads the store, and
    stages/commands/repair.py removes such parts.
    """
    if not part.exists():
        return None
    try:
        return read_head(part, part_fingerprint(stage.fingerprint, part))
    except PipelineError as error:
        print(f"{stage.name}: {error}; it is made again", file=sys.stderr)
        part.unlink()
        return None


def _rows_digest(chunk: Sequence[Input]) -> str:
    content = hashlib.blake2b(digest_size=16)
    for clip in chunk:
        name = clip.clip_id.encode()
        content.update(len(name).to_bytes(4, "little") + name + clip.digest + bytes([clip.absent]))
    return content.hexdigest()


def _compute(
    todo: list[Shard], work: Work, stage: Stage, params: Params, devices: Sequence[str]
) -> Iterator[int]:
    """Yield 0 once the work is open, then the number of clips of each shard as it is done."""
    if not todo:
        return
    if params.runtime.executor == "ray":
        from stages.engine.ray_executor import compute_in_ray

        yield from compute_in_ray(todo, work, stage, params, gpu=[*devices] != ["cpu"])
        return
    if len(devices) > 1 and len(todo) > 1:
        yield 0
        workers = max(1, pick_workers(params.runtime) // len(devices))
        yield from _in_processes(todo, work, stage, devices, workers)
        return
    work.open(devices[0])
    try:
        yield 0
        yield from write_shards(todo, work, stage)
    finally:
        work.close()


def write_shards(todo: Iterable[Shard], work: Work, stage: Stage) -> Iterator[int]:
    """Compute shards with open work; yields the number of clips of each once it is written."""
    begun: deque[Shard] = deque()

    def chunks() -> Iterator[Sequence[Input]]:
        for shard in todo:
            begun.append(shard)
            yield shard[1]

    for rows in work.shards(chunks()):
        part, chunk = begun.popleft()
        # The shard's number is not part of its bytes: it may change when the corpus grows.
        attributes = {**stage.attributes, **work.attributes, "fingerprint": part_fingerprint(stage.fingerprint, part)}
        write_shard(part, stage.kind, rows, attributes)
        yield len(chunk)


def _in_processes(
    todo: list[Shard], work: Work, stage: Stage, devices: Sequence[str], workers: int
) -> Iterator[int]:
    """One process per device; the shards are in one queue, so a fast device does more of them."""
    context = multiprocessing.get_context("spawn")
    shards, done = context.Queue(), context.Queue()
    for shard in [*todo, *[None] * len(devices)]:
        shards.put(shard)
    with ProcessPoolExecutor(len(devices), context, _set_queues, (shards, done)) as pool:
        processes = [pool.submit(_work_on_device, work, stage, device, workers) for device in devices]
        try:
            for _ in todo:
                while True:
                    try:
                        yield done.get(timeout=POLL_SECONDS)
                        break
                    except queue.Empty:
                        for process in processes:
                            if process.done():
                                process.result()  # raises what ended it
        except BrokenProcessPool:
            raise PipelineError(
                f"{stage.name}: a device's process was ended from outside (out of memory?); finished shards are kept, "
                f"run it again to go on"
            ) from None
        finally:
            _empty(shards)  # after an error the other processes end with the shards that they have begun


def _empty(shards: Any) -> None:
    """Leave nothing but the Nones."""
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


def _work_on_device(work: Work, stage: Stage, device: str, workers: int) -> None:
    work.open(device, workers)
    try:
        for count in write_shards(iter(_shards.get, None), work, stage):
            _done.put(count)
    finally:
        work.close()


def _check_bad_fraction(stage: Stage, inputs: Sequence[Input], heads: Sequence[Head], limit: float) -> None:
    known = {clip.clip_id for clip in inputs if clip.absent}
    bad = [(clip_id, reason) for clip_id, present, reason in heads if not present and clip_id not in known]
    if len(bad) <= limit * len(inputs):
        return
    listing = Path(".cache") / f"skipped-{stage.name}.csv"
    write_rows(listing, ["clip_id", "reason"], bad)
    shown = "; ".join(f"{clip_id}: {reason}" for clip_id, reason in bad[:REASONS_SHOWN])
    raise PipelineError(
        f"{stage.name}: {len(bad)} of {len(inputs)} clips can't be used, more than corpus.max_bad_fraction "
        f"= {limit} allows; all in {listing}; {shown}{' ...' if len(bad) > REASONS_SHOWN else ''}"
    )


def _finalise(stage: Stage, parts: Sequence[Path], keep_parts: bool) -> None:
    """Link (or, across file systems, copy) the parts into the out folder; nothing is ever written through a link."""
    out = stage.out
    empty_folder(out)
    names = [f"shard-{i:05d}.h5" for i in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        try:
            os.link(part, out / name)
        except OSError:
            with open(part, "rb") as source, replacing(out / name, "wb") as target:
                shutil.copyfileobj(source, target)
    write_index(out, names, [part_fingerprint(stage.fingerprint, part) for part in parts])
    if not keep_parts and parts:
        shutil.rmtree(parts[0].parent)
