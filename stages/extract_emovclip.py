"""Stage extract_emovclip: every clip's video feature under each fold's prompts, in features/emovclip/fold-*/.

Leak-free [choice]: fold f's fusion sees fold f's features of all its clips. With emovclip.scope: all there is one
store, features/emovclip/ itself. A clip's feature is the mean of its frames' features; there is no variance.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from stages.errors import PipelineError, run_stage
from stages.extraction import Encode, Encoder, Stage, StoreReader, extract, pick_devices, pick_workers, store_inputs
from stages.fingerprint import checkpoint_digest, stage_fingerprint
from stages.params import load

PROMPTS = Path("models/emovclip")
OUT = Path("features/emovclip")


def make_encoder(device: str, **config: Any) -> Encoder:
    """EmoVCLIP's image tower with one fold's prompts."""
    from stages.encoders import emovclip

    return emovclip.Encoder(emovclip.Config(**config), device)


def main() -> None:
    p = load()
    e = p.emovclip
    names = ["all"] if e.scope == "all" else [path.stem for path in sorted(PROMPTS.glob("fold-*.safetensors"))]
    if not names:
        raise PipelineError(f"{PROMPTS}: no prompts found; make them with: dvc repro train_emovclip")
    inputs = store_inputs("data/frames")
    memory = p.runtime.batch_memory_mb
    if OUT.exists():
        shutil.rmtree(OUT)
    for name in names:
        prompts = PROMPTS / f"{name}.safetensors"
        config: dict[str, Any] = {"checkpoint": e.checkpoint, "revision": e.revision, "dtype": e.dtype}
        work = Encode(
            partial(make_encoder, **config, prompts=str(prompts)),
            StoreReader("data/frames"),
            keep_frames=e.keep_frames,
            variance=False,
            threads=pick_workers(p.runtime),
            batch_bytes=None if memory == "auto" else memory << 20,
        )
        attributes = {"extractor": "emovclip", "encoder": "emovclip", "prompts": name, **config}
        digest = checkpoint_digest(e.checkpoint) + prompts.read_bytes()
        stage = Stage("extract_emovclip", OUT if name == "all" else OUT / name, "features", attributes,
                      stage_fingerprint("extract_emovclip", digest))
        extract(stage, inputs, work, p, pick_devices(p.runtime.device))


if __name__ == "__main__":
    run_stage(main)
