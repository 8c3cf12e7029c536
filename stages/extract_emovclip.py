"""Stage extract_emovclip: every clip's video feature under each fold's prompts, in features/emovclip/fold-*/.

Leak-free [choice]: fold f's fusion sees fold f's features of all its clips. With emovclip.scope: all there is one
store, features/emovclip/ itself. A clip's feature is the mean of its frames' features; there is no variance.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from stages.encoders.pooling import pooled_row
from stages.engine.devices import stage_devices
from stages.engine.encoding import Encode, Encoder, StoreReader, identity, store_inputs
from stages.engine.errors import PipelineError, run_stage
from stages.engine.extraction import Stage, extract
from stages.engine.files import empty_folder
from stages.engine.fingerprint import checkpoint_digest, stage_fingerprint
from stages.engine.params import load

PROMPTS = Path("models/emovclip")
OUT = Path("features/emovclip")
KEPT_BYTES = 2 << 30


class FromClipId:
    """An encoder that is fed clip ids: what it prepared for one fold serves the next, as far as KEPT_BYTES go.

    Decoding a frame costs more than a small tower needs for it, and every fold wants the same frames.
    """

    def __init__(self, encoder: Encoder, read: Callable[[str], Any], kept: dict[str, np.ndarray]):
        self.dimension, self.unit_bytes, self.padded = encoder.dimension, encoder.unit_bytes, encoder.padded
        self.size, self.encode, self.concurrent = encoder.size, encoder.encode, encoder.concurrent
        self._prepare, self._read, self._kept = encoder.prepare, read, kept
        self._room = KEPT_BYTES - sum(prepared.nbytes for prepared in kept.values())
        self._lock = Lock()

    def prepare(self, clip_id: str) -> np.ndarray:
        """The clip's frames as the encoder takes them. Skip where it can't use them. Thread-safe."""
        if clip_id in self._kept:
            return self._kept[clip_id]
        prepared = self._prepare(self._read(clip_id))
        with self._lock:
            if prepared.nbytes <= self._room:
                self._room -= prepared.nbytes
                self._kept[clip_id] = prepared
        return prepared


def make_encoder(device: str, kept: dict[str, np.ndarray], **config: Any) -> Encoder:
    """EmoVCLIP's image tower with one fold's prompts."""
    from stages.encoders import emovclip

    return FromClipId(emovclip.Encoder(emovclip.Config(**config), device), StoreReader("data/frames"), kept)


def main() -> None:
    p = load()
    e = p.emovclip
    names = ["all"] if e.scope == "all" else [path.stem for path in sorted(PROMPTS.glob("fold-*.safetensors"))]
    if not names:
        raise PipelineError(f"{PROMPTS}: no prompts found; make them with: dvc repro train_emovclip")
    inputs = store_inputs("data/frames")
    kept: dict[str, np.ndarray] = {}
    empty_folder(OUT)
    for name in names:
        prompts = PROMPTS / f"{name}.safetensors"
        config: dict[str, Any] = {"checkpoint": e.checkpoint, "revision": e.revision, "dtype": e.dtype}
        work = Encode(
            partial(make_encoder, kept=kept, **config, prompts=str(prompts)),
            identity,
            partial(pooled_row, keep_frames=e.keep_frames, variance=False),
            p.runtime,
        )
        attributes = {"extractor": "emovclip", "encoder": "emovclip", "variance": False, "prompts": name, **config}
        digest = checkpoint_digest(e.checkpoint) + prompts.read_bytes()
        stage = Stage("extract_emovclip", OUT if name == "all" else OUT / name, "features", attributes,
                      stage_fingerprint("extract_emovclip", digest))
        extract(stage, inputs, work, p, stage_devices(p.runtime))


if __name__ == "__main__":
    run_stage(main)
