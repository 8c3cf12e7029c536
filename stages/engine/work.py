"""What the extraction engine hands to its executors: clips in shards, and the work that turns them into rows.

A shard is a run of clips in manifest order, `shard_size` at most. Where a run is cut depends on the clips' names alone:
it is cut before the clip whose name has the largest hash, and so are both halves, until each is small enough. So one
clip more or less anywhere changes the shard or two that it touches, and all others stay as they are.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from stages.engine.fingerprint import PARTS
from stages.engine.store import Row, write_shard


@dataclass(frozen=True)
class Input:
    """One clip as a stage sees it: `item` locates or holds its input, `digest` identifies the input's content."""

    clip_id: str
    item: Any
    digest: bytes
    absent: bool = False  # upstream has nothing for this clip, and recorded why


@dataclass(frozen=True)
class Target:
    """The store that a stage writes: the stage's name in dvc.yaml, out folder, kind of store and shard attributes."""

    stage: str
    out: Path
    kind: str
    attributes: Mapping[str, Any]
    fingerprint: str


class Shard(NamedTuple):
    """A finished shard is the file `part`, written whole or not at all; existence means done."""

    part: Path
    clips: Sequence[Input]


class Work(Protocol):
    """Turns shards into rows. Picklable; heavy parts are made in `open`, once per device process.

    `shards` gives each shard with its clips' rows, in any order; it may take shards ahead of those it gives back.
    `attributes` (known once open) join the target's own. `workers`: how many may decode at once, None =
    runtime.workers.
    """

    attributes: Mapping[str, Any]

    def open(self, device: str, workers: int | None = None) -> None: ...

    def shards(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, list[Row]]]: ...

    def close(self) -> None: ...


def plan(target: Target, inputs: Sequence[Input], shard_size: int) -> list[Shard]:
    """The target's shards, in manifest order."""
    folder = PARTS / target.stage / target.fingerprint
    return [Shard(folder / f"{clips_digest(chunk)}.h5", chunk) for chunk in cut(inputs, shard_size)]


def cut(inputs: Sequence[Input], size: int) -> list[Sequence[Input]]:
    """Runs of at most `size` clips; half of that on average."""
    names = (clip.clip_id.encode() for clip in inputs)
    hashes = np.array([int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) for name in names], np.uint64)
    runs, todo = [], [(0, len(inputs))]
    while todo:
        start, end = todo.pop()
        if end - start > size:
            middle = start + 1 + int(hashes[start + 1 : end].argmax())
            todo += [(middle, end), (start, middle)]
        elif end > start:
            runs.append(inputs[start:end])
    return runs


def clips_digest(clips: Sequence[Input]) -> str:
    """Of the clips' names and inputs, in order."""
    content = hashlib.blake2b(digest_size=16)
    for clip in clips:
        name = clip.clip_id.encode()
        content.update(len(name).to_bytes(4, "little") + name + clip.digest + bytes([clip.absent]))
    return content.hexdigest()


def part_fingerprint(fingerprint: str, part: Path) -> str:
    """What a part of a stage with this fingerprint carries: its stage's and its clips'."""
    return f"{fingerprint}-{part.stem}"


def write_shards(todo: Iterable[Shard], work: Work, target: Target) -> Iterator[Shard]:
    """Compute shards with open work; yields each one once it is written."""
    for shard, rows in work.shards(todo):
        # The shard's number is not part of its bytes: it may change when the corpus grows.
        fingerprint = part_fingerprint(target.fingerprint, shard.part)
        attributes = {**target.attributes, **work.attributes, "fingerprint": fingerprint}
        write_shard(shard.part, target.kind, rows, attributes)
        yield shard
