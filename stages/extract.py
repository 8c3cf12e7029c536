"""Stage extract@<name>: one row of `extractors` in params.yaml, its encoder over all clips, in features/<name>/."""

import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.encoders.pooling import pooled_row
from stages.engine.devices import stage_devices
from stages.engine.encoding import Encode, Encoder, StoreReader, identity, store_inputs
from stages.engine.errors import PipelineError, run_stage
from stages.engine.extraction import Input, Stage, extract
from stages.engine.fingerprint import checkpoint_digest, stage_fingerprint
from stages.engine.manifest import read_manifest, read_transcripts
from stages.engine.params import Extractor, describe, load

COMMON = ("checkpoint", "revision", "dtype")  # what every encoder's Config has


def make_encoder(device: str, name: str, row: Extractor) -> Encoder:
    """The row's encoder on a device. Raises PipelineError for an unknown encoder or a bad option."""
    module = f"stages.encoders.{row.encoder}"
    if not (Path(__file__).parent / "encoders" / f"{row.encoder}.py").exists():
        raise PipelineError(f"params.yaml: extractors.{name}.encoder: found {row.encoder!r}, expected a module in "
                            f"stages/encoders")
    encoder = importlib.import_module(module)
    try:
        config = encoder.Config(**row.options)
    except ValidationError as error:
        raise PipelineError(f"params.yaml: extractors.{name}.{describe(error)}") from None
    return encoder.Encoder(config, device)


def text_items(source: str) -> Mapping[str, Any]:
    """clip_id -> transcript, or {transcript, ranking, reason}; clips without text are missing."""
    if source == "transcripts.csv":
        return {clip_id: text for clip_id, text in read_transcripts().items() if text}
    with open("data/rankings.jsonl", encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    return {
        clip_id: {key: answer.get(key) for key in ("transcript", "ranking", "reason")}
        for answer in answers
        for clip_id in answer["clip_ids"]
    }


def text_inputs(source: str) -> list[Input]:
    items = text_items(source)
    inputs = []
    for clip in read_manifest():
        item = items.get(clip.clip_id, "")  # an empty text: the encoder skips the clip and says why
        digest = hashlib.blake2b(json.dumps(item, sort_keys=True).encode(), digest_size=16).digest()
        inputs.append(Input(clip.clip_id, item, digest))
    return inputs


def main() -> None:
    p = load()
    name = sys.argv[1]
    if name not in p.extractors:
        raise PipelineError(f"params.yaml: extractors: found no row {name!r}, expected one of {sorted(p.extractors)}")
    row = p.extractors[name]
    for key in COMMON:
        if key not in row.options:
            raise PipelineError(f"params.yaml: extractors.{name}.{key}: missing; every encoder needs it")
    checkpoint = str(row.options["checkpoint"])
    devices = stage_devices(p.runtime)
    is_text = row.input.endswith((".csv", ".jsonl"))
    attributes = {"extractor": name, "encoder": row.encoder, "variance": True, **{k: row.options[k] for k in COMMON}}
    work = Encode(
        partial(make_encoder, name=name, row=row),
        identity if is_text else StoreReader(f"data/{row.input}"),
        partial(pooled_row, keep_frames=row.keep_frames, variance=True),
        p.runtime,
    )
    stage = Stage(f"extract@{name}", Path("features") / name, "features", attributes,
                  stage_fingerprint(f"extract@{name}", checkpoint_digest(checkpoint)))
    extract(stage, text_inputs(row.input) if is_text else store_inputs(f"data/{row.input}"), work, p, devices)


if __name__ == "__main__":
    run_stage(main)
