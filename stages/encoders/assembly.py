"""From a row of `extractors` in params.yaml to its encoder, for the pipeline and for predict."""

import hashlib
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.encoders.pooling import encoded_row
from stages.engine.encoding import Encode, Encoder
from stages.engine.errors import PipelineError
from stages.engine.fingerprint import checkpoint_digest
from stages.engine.params import Extractor, Runtime
from stages.engine.yaml_file import describe


def make_encoder(device: str, name: str, row: Extractor) -> Encoder:
    """The row's encoder on a device. Raises PipelineError for an unknown encoder or a bad option."""
    if not (Path(__file__).parent / f"{row.encoder}.py").exists():
        raise PipelineError(f"params.yaml: extractors.{name}.encoder: found {row.encoder!r}, expected a module in "
                            f"stages/encoders")
    encoder = importlib.import_module(f"stages.encoders.{row.encoder}")
    try:
        config = encoder.Config(**row.options)
    except ValidationError as error:
        raise PipelineError(f"params.yaml: extractors.{name}.{describe(error)}") from None
    return encoder.Encoder(config, device)


def encode_work(
    name: str, row: Extractor, read: Callable[[Any], Any], runtime: Runtime, keep_frames: bool = False
) -> Encode:
    """The engine's work that encodes and pools what `read` gives for a clip's item."""
    make = partial(make_encoder, name=name, row=row)
    return Encode(make, read, partial(encoded_row, keep_frames=keep_frames), runtime)


def loaded_digest(row: Extractor) -> bytes:
    """Digest of the local folders that the encoder loads: a checkpoint, prompts."""
    return hashlib.blake2b(b"".join(map(checkpoint_digest, row.loads.values())), digest_size=16).digest()
