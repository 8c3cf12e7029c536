"""Work of the engine that is one function per clip, in worker processes that may crash or hang: the media stages."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.engine.devices import pick_workers
from stages.engine.errors import Died, PipelineError, Skip, describe, is_machines, working_on
from stages.engine.extraction import leave_empty, write_store
from stages.engine.fingerprint import stage_fingerprint
from stages.engine.manifest import Source, read_manifest, source_of
from stages.engine.params import Params
from stages.engine.plan import left_out
from stages.engine.store import INDEX, Row, read_index
from stages.engine.versions import MEDIA, versions
from stages.engine.work import Input, Shard, Target
from stages.engine.workers import Workers

Decode = Callable[[str, Source], Row]  # (clip_id, file or segment) -> its row; raises Skip
HELD_CLIPS = 256  # in shards that wait for a clip to be tried again: what they take of memory, and a kill of time


def write_media_store(stage: str, out: Path, kind: str, decoder: Callable[[Params], Decode], params: Params,
                      attributes: Mapping[str, Any]) -> None:
    """Write a media store: `decoder(params)(clip_id, source) -> Row` over the manifest's clips, in worker processes.

    It stays empty where the plan leaves it out. Raises PipelineError where a row of fusion.modalities reads it, and no
    clip has such a stream.
    """
    if reason := left_out(out.name):
        leave_empty(stage, out, reason)
        return
    root = Path(params.corpus.path)
    inputs = [Input(c.clip_id, source_of(c, root), bytes.fromhex(c.digest)) for c in read_manifest()]
    target = Target(stage, out, kind, attributes, stage_fingerprint(stage))
    runtime = params.runtime
    work = PerClip(decoder(params), pick_workers(runtime), runtime.clip_timeout_seconds)
    write_store(target, inputs, work, params, ["cpu"])
    readers = [name for name in params.fusion.modalities if params.extractors[name].input == out.name]
    if readers and (out / INDEX).exists() and (reason := read_index(out).get("empty")):
        raise PipelineError(f"{stage}: {reason}, but fusion.modalities names {', '.join(readers)}, made from {out}; "
                            f"expected a corpus that has it, or modalities without")


class PerClip:
    """Media work: `function(clip_id, item) -> Row` in worker processes.

    `function` raises Skip(reason) for a clip it can't use. A clip whose decoder crashes or takes longer than `timeout`
    seconds is tried once more, alone, after the others; should it die again, it is absent, with the reason. A fault of
    the machine stops the stage.
    """

    def __init__(self, function: Callable[[str, Any], Row], workers: int, timeout: float):
        self.function, self.workers, self.timeout = function, workers, timeout
        self.attributes: Mapping[str, Any] = {}

    def open(self, device: str, workers: int | None = None) -> None:
        self._pool = Workers(workers or self.workers, self.timeout)
        self.attributes = {"device": device, "versions": versions(MEDIA)}

    def close(self) -> None:
        self._pool.close()

    def shards(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, list[Row]]]:
        begun: deque[tuple[Shard, Iterator[Any]]] = deque()
        held: list[tuple[Shard, list[Row]]] = []

        def finish(left: int) -> Iterator[tuple[Shard, list[Row]]]:
            while len(begun) > left:
                shard, results = begun.popleft()
                rows = rows_of(shard.clips, results)
                if any(row.died for row in rows):
                    held.append((shard, rows))
                else:
                    yield shard, rows

        for shard in shards:
            begun.append((shard, self._begin(shard.clips)))
            yield from finish(1)  # one ahead, so that no worker is idle while a shard's last clips are decoded
            if sum(len(rows) for _, rows in held) > HELD_CLIPS:
                yield from finish(0)
                yield from self._again(held)
        yield from finish(0)
        yield from self._again(held)

    def _begin(self, clips: Sequence[Input]) -> Iterator[Any]:
        return self._pool.map(self.function, [(clip.clip_id, clip.item) for clip in clips if not clip.absent])

    def _again(self, held: list[tuple[Shard, list[Row]]]) -> Iterator[tuple[Shard, list[Row]]]:
        """Try what died once more, one clip at a time, and empty `held`."""
        while held:
            shard, rows = held.pop(0)
            for i, row in enumerate(rows):
                if row.died:
                    (rows[i],) = rows_of([shard.clips[i]], self._begin([shard.clips[i]]))
            yield shard, rows


def rows_of(clips: Sequence[Input], results: Iterator[Any]) -> list[Row]:
    """The clips' rows of what Workers.map gave for those that are not absent upstream.

    Raises PipelineError for a fault of the machine.
    """
    rows = []
    for clip in clips:
        if clip.absent:
            rows.append(Row(clip.clip_id))
            continue
        with working_on(f"clip {clip.clip_id}"):
            result = next(results)
        if is_machines(result):
            raise PipelineError(f"clip {clip.clip_id}: {describe(result)}")
        rows.append(result_row(clip.clip_id, result))
    return rows


def result_row(clip_id: str, result: Row | Skip) -> Row:
    """A worker's result as the clip's row."""
    if isinstance(result, Skip):
        return Row(clip_id, reason=str(result), died=isinstance(result, Died))
    return result
