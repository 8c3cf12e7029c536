"""What the whole of MER2024 costs on several machines, stage by stage.

    mer estimate

Computed: operations, counted on the models' real shapes (no weights, no memory), over a device's nominal bfloat16 rate
times the share that is the target of benchmarks.encoders: an estimate until that has run on the device. Measured: what
cores do, here, in processor time of one core (a drawn 960 x 720 clip; the fusion on random features), and shared out
among the machine's cores; of the rest, what benchmarks.scale took at this size on two cores. Fusion and self-training
count as done by cores, though a GPU may do them. Not in the sum: transcripts, which corpora bring; rankings, which wait
for a server; reading and hashing of the clips and of their crops, which the disk decides.
"""

import argparse
import math
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from stages.engine.devices import set_threads
from stages.engine.errors import run_stage
from stages.engine.params import Params, load
from stages.evaluation.figures import removals
from stages.fusion.ensemble import Outputs
from stages.fusion.features import Inputs, Modality
from stages.fusion.training import train
from stages.media.audio import load_audio
from stages.media.centerface import crop_clip
from stages.media.frames import sample_frames

CLIPS, LABELLED, SECONDS, FPS = 120_625, 5030, 4.5, 25  # [shared/design.md, section 8: clips average 4 to 5 s]
TOKENS, FRAMES, FOLDS, EPOCHS = 60, 16, 5, 20  # a ranking and a transcript; presets/mer2024.yaml
PROMPTED = 1 + 4 / 257  # tokens of ViT-L/14 with four prompts
TEST = 20_000  # scored clips: every subset of modalities is evaluated on them [shared/design.md, section 8]
DIMENSIONS = {"hubert": 2048, "clip": 1536, "emovclip": 768, "baichuan": 10240}  # pooled features
OTHER = 600  # seconds: gathering and reading features, split, report page, hashing by DVC (benchmarks/README.md)
CORES = 16  # of one machine
SOUND, FACES = "extract_audio", "crop_faces, every frame"
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


def media_seconds(p: Params) -> dict[str, float]:
    """Seconds of one core, as the params have it: per frame whose face is found, per clip whose frames are sampled, and
    per clip whose sound is decoded.
    """
    faces, rng = p.faces, np.random.default_rng(0)
    frames = [cv2.resize(frame, (960, 720)) for frame in animate("happiness", np.ones(int(SECONDS * FPS)), rng)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, frames, rng.normal(0, 0.1, int(SECONDS * 44100)).astype(np.float32), 44100)
        cv2.setNumThreads(1)

        def crop() -> list[bytes]:
            options = (faces.stride, faces.size, faces.min_confidence, faces.quality, faces.detect_every)
            return crop_clip(path, *options)[0]

        assert len(crop()) > len(frames) // 2  # and the network is loaded
        return {"face of a frame": core_seconds(crop) / len(frames),
                "frames of a clip": core_seconds(lambda: sample_frames(path, FRAMES, 224, 95)),
                "sound of a clip": core_seconds(lambda: load_audio(path, p.audio.sample_rate))}


def fusion_seconds(p: Params) -> dict[str, float]:
    """Seconds of one core per clip and model: an epoch of training, a prediction, a prediction for every subset of the
    modalities; with random features of the published dimensions.
    """
    count = 128 * FOLDS
    present = torch.ones(count, dtype=torch.bool)
    modalities = tuple(Modality(name, torch.randn(1, count, size).half(), torch.zeros(1, size), torch.ones(1, size),
                                present) for name, size in DIMENSIONS.items())
    labels = np.arange(count) % len(p.corpus.labels)
    every_model = np.tile(labels, (1, FOLDS, 1))
    inputs = Inputs([str(i) for i in range(count)], np.full(count, "labelled"), labels, np.arange(count) % FOLDS,
                    tuple(p.corpus.labels), modalities)
    recipe = p.fusion.model_copy(update={"epochs": 1, "seeds": [0], "modalities": list(DIMENSIONS)})
    set_threads(True)  # as the stages do
    done: list[Outputs] = []
    train(inputs, recipe, every_model, "warming up")
    training = core_seconds(lambda: done.append(train(inputs, recipe, every_model, "estimate")))
    ensemble, rows, subsets = done[0].ensemble, np.arange(count), list(removals(list(DIMENSIONS)))
    predicting = core_seconds(lambda: ensemble.predict(inputs, rows))
    every_subset = core_seconds(lambda: ensemble.predict_without(inputs, rows, subsets))  # by a clip's own model alone
    return {"clip trained on once": training / (count * (FOLDS - 1)), "clip predicted": predicting / (count * FOLDS),
            "clip predicted with every subset": every_subset / count}


def core_seconds(function: Callable[[], Any]) -> float:
    """Processor time of all threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


@dataclass(frozen=True)
class Stage:
    """seconds: on a machine, with all of its cores and GPUs. early: needs neither faces nor sound on a GPU, so that
    `mer repro` runs it beside those."""

    name: str
    basis: str
    seconds: Callable[[Machine], float]
    gpu: bool = False
    early: bool = False


def stages_of(p: Params, units: Mapping[str, float], core: Mapping[str, float]) -> list[Stage]:
    """units: per_unit's; core: media_seconds' and fusion_seconds'."""
    images, prompted = FPS * SECONDS * CLIPS, units["clip"] * PROMPTED * FRAMES
    models, trainings, others = FOLDS * len(p.fusion.seeds), 1 + p.self_training.rounds, CLIPS - LABELLED
    learned = LABELLED * (1 - 1 / FOLDS)
    training = models * (p.fusion.epochs * learned * core["clip trained on once"] + others * core["clip predicted"])
    subsets = len(p.fusion.seeds) * (FOLDS * TEST + LABELLED) * core["clip predicted with every subset"]

    def measured(name: str, seconds: float, everywhere: bool = True) -> Stage:
        """`everywhere`: on the cores of all machines."""
        return Stage(name, "measured here", lambda m: seconds / (m.cores if everywhere else min(m.cores, CORES)))

    def computed(name: str, share: str, operations: Callable[[Machine], float], early: bool = False,
                 everywhere: bool = True) -> Stage:
        def seconds(m: Machine) -> float:
            return operations(m) / (m.flops * SHARE[share] * (m.gpus if everywhere else 1))

        return Stage(name, "computed", seconds, gpu=True, early=early)

    return [
        measured(SOUND, CLIPS * core["sound of a clip"]),
        measured("slice_frames", CLIPS * core["frames of a clip"]),
        measured(FACES, images * core["face of a frame"]),
        computed("extract@hubert", "hubert", lambda m: CLIPS * SECONDS * units["hubert"]),
        computed("extract@clip, every face", "clip", lambda m: images * units["clip"]),
        computed("extract@baichuan", "baichuan", lambda m: CLIPS * units[m.decoder], early=True),
        computed("train_emovclip, one device", "clip", lambda m: FOLDS * EPOCHS * learned * prompted * (1 + BACKWARD),
                 early=True, everywhere=False),
        computed("extract_emovclip, five folds", "clip", lambda m: CLIPS * FOLDS * prompted, early=True),
        measured("train_fusion", training, everywhere=False),
        measured("self_train", (trainings - 1) * training, everywhere=False),
        measured("evaluate, every subset", subsets, everywhere=False),
        Stage("reading features, tables, report, DVC", "measured by benchmarks.scale", lambda m: OTHER),
    ]


def table(stages: Sequence[Stage]) -> str:
    """Markdown: hours per machine, their sums, and the sum where `mer repro` crops faces while the GPU computes."""
    def row(name: str, basis: str, hours: Iterable[float], bold: str = "") -> str:
        return "| " + " | ".join([f"{bold}{name}{bold}", basis, *(f"{bold}{shown(h)}{bold}" for h in hours)]) + " |"

    lines = [f"| hours | basis | {' | '.join(m.name for m in MACHINES)} |", "|---|---|" + "---|" * len(MACHINES)]
    lines += [row(s.name, s.basis, (s.seconds(m) / 3600 for m in MACHINES)) for s in stages]
    both = [(sum(s.seconds(m) for s in stages) / 3600, saved(stages, m) / 3600) for m in MACHINES]
    measured = [sum(s.seconds(m) for s in stages if not s.gpu) / 3600 for m in MACHINES]
    return "\n".join([*lines, row("all, one after another", "", (total for total, _ in both), "**"),
                      row("of it measured", "", measured),
                      row("all, with mer repro", "", (total - less for total, less in both), "**")])


def saved(stages: Sequence[Stage], machine: Machine) -> float:
    """Seconds that cores crop faces and decode sound while the GPU does what needs neither."""
    cores = sum(s.seconds(machine) for s in stages if s.name in (SOUND, FACES))
    return min(cores, sum(s.seconds(machine) for s in stages if s.early))


def main(arguments: Sequence[str]) -> None:
    argparse.ArgumentParser("mer estimate", allow_abbrev=False, description="Hours that the whole of MER2024 takes on "
                            "several machines, and which are measured; takes half a minute").parse_args(arguments)
    p = load("presets/mer2024.yaml")
    units, core = per_unit(), {**media_seconds(p), **fusion_seconds(p)}
    print("; ".join(f"{name} {value / 1e9:,.0f}" for name, value in units.items())
          + f" billion operations per second of audio, image, {TOKENS} tokens")
    print(f"measured here, ms of one core of {processor()}: "
          + ", ".join(f"{name} {1e3 * value:.3g}" for name, value in core.items()) + "\n")
    print(table(stages_of(p, units, core)))


def processor() -> str:
    """What this machine's CPU calls itself."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or "this machine"


def shown(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 1 else f"{math.ceil(hours * 60)} min"


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
