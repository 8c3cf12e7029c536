"""Work for the nodes of the tests' Ray cluster: they import this module, so it is light."""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stages.engine.store import Row
from stages.engine.work import Input, Shard

LOG = Path("log")  # in the shared folder: a line "clip node" whenever a clip is computed


def computed() -> list[tuple[str, str]]:
    """(clip, node) in the order in which they were computed."""
    return [(clip, node) for clip, node in (line.split() for line in LOG.read_text().splitlines())]


def note(clip_id: str) -> str:
    """Write a clip to the log; returns the node that this is."""
    import ray

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
    with open(LOG, "a") as log:
        log.write(f"{clip_id} {node}\n")
    return node


class Words:
    """A text for every clip. At the clip `fails` it raises, at `dies` its process ends.

    On the node `doomed` it hangs at the fifth clip; the other nodes wait for that.
    """

    def __init__(self, fails: str = "", dies: str = "", doomed: str = ""):
        self.fails, self.dies, self.doomed = fails, dies, doomed
        self.attributes: dict[str, Any] = {}

    def open(self, device: str, workers: int | None = None) -> None:
        assert device == "cpu"
        self.attributes = {"opened": 1}

    def close(self) -> None: ...

    def shards(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, list[Row]]]:
        for shard in shards:
            yield shard, [self._row(clip) for clip in shard.clips]

    def _row(self, clip: Input) -> Row:
        node = note(clip.clip_id)
        while self.doomed and (node == self.doomed) == (len([n for _, n in computed() if n == self.doomed]) > 4):
            time.sleep(0.02)
        if clip.clip_id == self.dies:
            os._exit(1)
        if clip.clip_id == self.fails:
            error = ArithmeticError("the sum is wrong")
            error.add_note(f"clip {clip.clip_id}")
            raise error
        return Row(clip.clip_id, values=f"text {clip.item}")


class Ramps:
    """A slow encoder: clip i is i + 2 frames of four numbers."""

    dimension, unit_bytes, padded, concurrent = 4, 1000, True, True

    def prepare(self, item: int) -> np.ndarray:
        note(f"c{item:02d}")
        return np.arange((item + 2) * 4, dtype=np.float32).reshape(-1, 4)

    def size(self, prepared: np.ndarray) -> int:
        return len(prepared)

    def encode(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        time.sleep(0.3)
        return [prepared / 3 for prepared in batch]


def make_ramps(device: str) -> Ramps:
    assert device == "cpu"
    return Ramps()


def identity(item: Any) -> Any:
    return item
