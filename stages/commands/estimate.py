"""What the whole of MER2024 costs, by calculation: operations of the published models over a device's speed.

    mer estimate

Operations are counted on the models' real shapes (no weights, no memory). A device's speed is its nominal bfloat16 rate
times the share that is the target of benchmarks.encoders: an estimate until that has run on the device. What the CPU
does per frame is measured here, on one core, on a drawn 960 x 720 clip. Corpora bring transcripts, and rankings wait
for a server, so neither is in the sum.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.commands.published import BAICHUAN_7B, BAICHUAN_13B, LAYERS, decoder_config, hubert_config
from stages.corpora.demo.portraits import animate
from stages.corpora.demo.video import write_clip
from stages.encoders.baichuan import Decoder
from stages.engine.errors import run_stage
from stages.engine.params import load
from stages.media.centerface import crop_clip, load_detector
from stages.media.frames import sample_frames

CLIPS, LABELLED, SECONDS, FPS = 120_625, 5030, 4.5, 25  # [shared/design.md, section 8: clips average 4 to 5 s]
TOKENS, FRAMES, FOLDS, EPOCHS = 60, 16, 5, 20  # a ranking and a transcript; presets/mer2024.yaml
PROMPTED = 1 + 4 / 257  # tokens of ViT-L/14 with four prompts
BACKWARD = 2  # with forward: frozen weights need no gradients of their own, checkpointing a second forward


@dataclass(frozen=True)
class Machine:
    """flops: nominal dense bfloat16 operations a second of one GPU. decoder: what its memory holds."""

    name: str
    flops: float
    decoder: str
    gpus: int
    cores: int


MACHINES = (
    Machine("one H200, 16 cores", 989e12, "13B", 1, 16),
    Machine("one 24 GB card (RTX 4090), 16 cores", 165e12, "7B", 1, 16),
    Machine("four such machines through Ray", 165e12, "7B", 4, 64),
)
SHARE = {"hubert": 0.30, "clip": 0.45, "baichuan": 0.45}  # of the nominal rate: the targets of benchmarks.encoders


def operations(model: Any, run: Callable[[Any], Any]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model.eval())
    return counter.get_total_flops()


def per_unit() -> dict[str, float]:
    """Operations per second of audio, image, and text of TOKENS, counted on the meta device."""
    import open_clip
    from open_clip.model import CLIP
    from transformers import HubertModel

    with torch.device("meta"):
        hubert = HubertModel(hubert_config(large=True))
        clip = CLIP(**open_clip.get_model_config("ViT-L-14-quickgelu"))
        found = {"hubert": operations(hubert, lambda m: m(torch.empty(1, 16000 * 4))) / 4,
                 "clip": operations(clip, lambda m: m.encode_image(torch.empty(1, 3, 224, 224)))}
        for name, size in (("13B", BAICHUAN_13B), ("7B", BAICHUAN_7B)):
            decoder = Decoder(decoder_config(size), LAYERS, name)
            found[name] = operations(decoder, lambda m: m(torch.zeros(1, TOKENS, dtype=torch.long)))
    return found


def media_seconds() -> tuple[float, float]:
    """Seconds of one core per frame whose face is found, as the preset has it, and per clip whose FRAMES frames are
    sampled.
    """
    faces = load("presets/mer2024.yaml").faces
    rng = np.random.default_rng(0)
    frames = [cv2.resize(frame, (960, 720)) for frame in animate("happiness", np.ones(int(SECONDS * FPS)), rng)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, frames, None, 16000)
        cv2.setNumThreads(1)
        load_detector()
        start = time.process_time()
        crops = crop_clip(path, faces.stride, faces.size, faces.min_confidence, faces.quality, faces.detect_every)[0]
        middle = time.process_time()
        sample_frames(path, FRAMES, 224, 95)
        end = time.process_time()
    assert len(crops) > len(frames) // 2
    return (middle - start) / len(frames), end - middle


def main(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser("mer estimate", allow_abbrev=False, description="Hours that the whole of MER2024 takes on "
                            "several machines, by calculation; measures one core for seconds").parse_args(arguments)
    units, (per_frame, per_clip) = per_unit(), media_seconds()
    print("; ".join(f"{name} {value / 1e9:,.0f}" for name, value in units.items())
          + f" billion operations per second of audio, image, {TOKENS} tokens")
    print(f"one core: {1e3 * per_frame:.0f} ms per frame whose face is found, "
          f"{1e3 * per_clip:.0f} ms per clip sampled\n")
    images = FPS * SECONDS * CLIPS
    prompted = units["clip"] * PROMPTED * FRAMES
    work = {
        "crop_faces, every frame (CPU)": images * per_frame,
        "slice_frames (CPU)": CLIPS * per_clip,
        "extract@hubert": CLIPS * SECONDS * units["hubert"],
        "extract@clip, every face": images * units["clip"],
        "extract@baichuan": CLIPS,
        "train_emovclip, one device": FOLDS * EPOCHS * LABELLED * (1 - 1 / FOLDS) * prompted * (1 + BACKWARD),
        "extract@emovclip, five folds": CLIPS * FOLDS * prompted,
    }
    print("| hours | " + " | ".join(m.name for m in MACHINES) + " |\n|---|" + "---|" * len(MACHINES))
    totals = [0.0] * len(MACHINES)
    for stage, amount in work.items():
        hours = [hours_of(stage, amount, units, machine) for machine in MACHINES]
        totals = [a + b for a, b in zip(totals, hours, strict=True)]
        print(f"| {stage} | " + " | ".join(shown(h) for h in hours) + " |")
    print("| **all** | " + " | ".join(f"**{shown(h)}**" for h in totals) + " |")


def hours_of(stage: str, amount: float, units: dict[str, float], machine: Machine) -> float:
    if stage.endswith("(CPU)"):
        return amount / machine.cores / 3600
    if stage == "extract@baichuan":
        return amount * units[machine.decoder] / (machine.flops * SHARE["baichuan"] * machine.gpus) / 3600
    share = SHARE["hubert" if "hubert" in stage else "clip"]
    return amount / (machine.flops * share * (1 if "one device" in stage else machine.gpus)) / 3600


def shown(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 1 else f"{math.ceil(hours * 60)} min"


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
