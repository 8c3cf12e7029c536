"""Work of the engine that is one function per clip, in worker processes that may crash or hang: the media stages."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.engine.devices import pick_workers
from stages.engine.errors import Skip, working_on
from stages.engine.extraction import Input, Stage, extract
from stages.engine.fingerprint import stage_fingerprint
from stages.engine.manifest import read_manifest
from stages.engine.params import Params
from stages.engine.store import Row
from stages.engine.workers import Workers


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

    def open(self, device: str, workers: int | None = None) -> None:
        self._pool = Workers(workers or self.workers, self.timeout)

    def close(self) -> None:
        self._pool.close()

    def shards(self, chunks: Iterable[Sequence[Input]]) -> Iterator[list[Row]]:
        begun: deque[tuple[Sequence[Input], Iterator[Any]]] = deque()
        for chunk in chunks:
            todo = [(clip.clip_id, clip.item) for clip in chunk if not clip.absent]
            begun.append((chunk, self._pool.map(self.function, todo)))
            if len(begun) > 1:  # so that no worker rests while a shard's last clips are decoded
                yield self._rows(*begun.popleft())
        while begun:
            yield self._rows(*begun.popleft())

    def _rows(self, chunk: Sequence[Input], results: Iterator[Any]) -> list[Row]:
        rows = []
        for clip in chunk:
            with working_on(f"clip {clip.clip_id}"):
                rows.append(Row(clip.clip_id) if clip.absent else next(results))
        return [
            Row(clip.clip_id, reason=str(row)) if isinstance(row, Skip) else row
            for clip, row in zip(chunk, rows, strict=True)
        ]
