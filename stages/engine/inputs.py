"""What the encoders are fed: for every clip of the corpus its item in data/, and how that is read.

A medium is what `input` of a row of `extractors` names: a store (audio, frames, faces) or a table of texts
(transcripts.csv, rankings.jsonl).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.engine.errors import insist
from stages.engine.manifest import read_manifest, read_transcripts
from stages.engine.store import Row, Store, read_index
from stages.engine.work import Input, clips_digest

DATA = Path("data")
TEXTS = ("transcripts.csv", "rankings.jsonl")


class StoreReader:
    """Reads a clip's item from a store; one per process, opened on first use."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._store: Store | None = None

    def __call__(self, clip_id: str) -> Any:
        store = self._store = self._store or Store(self.folder)
        return media_item(store.kind, insist(lambda: store.read(clip_id)), store.attrs.get("sample_rate"))


def media_item(medium: str, values: Any, sample_rate: Any) -> Any:
    """What encoders take of a clip's stored values: images as they are, sound with its rate in Hz."""
    return (values, int(sample_rate)) if medium == "audio" else values


def row_inputs(medium: str, rows: Sequence[Row], sample_rate: int) -> list[Input]:
    """Decoded clips that are in no store, with items that need no reader."""
    return [Input(row.clip_id, media_item(medium, row.values, sample_rate), b"", not row.present) for row in rows]


def identity(item: Any) -> Any:
    """Reads what is an encoder's input already."""
    return item


def medium_reader(medium: str) -> Callable[[Any], Any]:
    """From the items of medium_inputs to what an encoder takes."""
    return identity if medium in TEXTS else StoreReader(DATA / medium)


def medium_inputs(medium: str) -> list[Input]:
    """Every clip of the corpus, in manifest order."""
    return text_inputs(medium) if medium in TEXTS else store_inputs(Store(DATA / medium))


def medium_digest(medium: str, inputs: list[Input] | None = None) -> str:
    """Hex digest of the medium's content; a store's from its index alone. inputs: medium_inputs, if known already."""
    if medium in TEXTS:
        return clips_digest(text_inputs(medium) if inputs is None else inputs)
    return str(read_index(DATA / medium)["digest"])


def store_inputs(store: Store) -> list[Input]:
    """A store's clips, in order; each one's item is its id, for a StoreReader."""
    return [
        Input(clip_id, clip_id, digest, absent=not present)
        for clip_id, digest, present in zip(store.clip_ids, store.digests, store.present, strict=True)
    ]


def text_inputs(medium: str) -> list[Input]:
    """The clips' texts; a clip without one has an empty item: the encoder skips it and says why."""
    items = _text_items(medium)
    inputs = []
    for clip in read_manifest():
        item = items.get(clip.clip_id, "")
        digest = hashlib.blake2b(json.dumps(item, sort_keys=True).encode(), digest_size=16).digest()
        inputs.append(Input(clip.clip_id, item, digest))
    return inputs


def ranked_item(transcript: str, ranking: list[str] | None, reason: str | None) -> dict[str, Any]:
    """What text encoders take of a transcript with its ranking, or with the reason why it has none."""
    return {"transcript": transcript, "ranking": ranking, "reason": reason or None}


def _text_items(medium: str) -> Mapping[str, Any]:
    """clip_id -> transcript, or ranked_item; clips without text are missing."""
    if medium == "transcripts.csv":
        return {clip_id: text for clip_id, text in read_transcripts().items() if text}
    with open(DATA / medium, encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    return {
        clip_id: ranked_item(answer["transcript"], answer["ranking"], answer.get("reason"))
        for answer in answers
        for clip_id in answer["clip_ids"]
    }
