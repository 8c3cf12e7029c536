"""A repository with trained models, made in seconds: the demo's encoders, and random fusion models and prompts."""

import contextlib
import copy
import shutil
import tempfile
from pathlib import Path

import torch
from broken_media import clip
from fabricated_run import fabricate
from ruamel.yaml import YAML
from safetensors.torch import save_file

from stages.corpora.demo.checkpoints import make_baichuan, make_hubert
from stages.corpora.demo.clip_checkpoint import LAYERS, TEXT_WIDTH, WIDTH, make_clip
from stages.encoders.assembly import loaded_digest
from stages.engine.files import file_digest, write_json
from stages.engine.params import load
from stages.engine.yaml_file import read_yaml
from stages.evaluation import figures
from stages.evaluation.artefacts import read_run
from stages.fusion.architectures import Architecture
from stages.fusion.ensemble import Ensemble
from stages.train_emovclip import trained_for

ROOT = Path(__file__).parent.parent
SENTENCES = ["我今天很高兴", "你为什么不告诉我？", "他走了，再也不会回来。"]
DIMENSIONS = {"hubert": 128, "clip": 128, "emovclip": 64, "baichuan": 192}  # means and variances of the miniatures
FOLDS, SEEDS = 3, (0, 1)
TEMPERATURE = 2.0


def make_trained(root: Path) -> None:
    """params.yaml, models/ and reports/ below root, and three clips in root/clips."""
    values = copy.deepcopy(read_yaml(ROOT / "params.yaml"))
    values["runtime"] |= {"device": "cpu", "workers": 2}
    values["fusion"]["seeds"] = list(SEEDS)
    values["folds"]["count"] = FOLDS
    values["corpus"]["path"] = "/home/somebody/corpus"
    root.mkdir(parents=True, exist_ok=True)
    YAML().dump(values, root / "params.yaml")
    make_hubert(root / "models/demo/hubert", 0)
    make_clip(root / "models/demo/clip", 0)
    make_baichuan(root / "models/demo/baichuan", 0, SENTENCES)
    generator = torch.Generator().manual_seed(1)
    (root / "models/emovclip").mkdir()
    for fold in range(FOLDS):
        widths = {"vision": WIDTH, "text": TEXT_WIDTH}
        prompts = {name: torch.randn(LAYERS, 4, width, generator=generator) for name, width in widths.items()}
        save_file(prompts, root / f"models/emovclip/fold-{fold}.safetensors")
    with contextlib.chdir(root):  # where the paths in params.yaml begin
        write_json("models/emovclip/trained.json", trained_for(load().emovclip, FOLDS))
        save_ensemble()
    write_details(root / "reports")
    (root / "clips").mkdir()
    clip(root / "clips/a.mp4", count=30, seconds=1.2)
    clip(root / "clips/b.mkv", count=20, seconds=0.8, size=(400, 300))
    shutil.copyfile(root / "clips/a.mp4", root / "clips/c.mp4")


def save_ensemble(name: str = "attention", segments: tuple[int, ...] = (), **changes: int) -> None:
    """models/self_training and its temperature, in the working directory. changes: of DIMENSIONS."""
    save_models(make_ensemble(name, segments, **changes))


def save_models(ensemble: Ensemble) -> None:
    """The same of a given ensemble."""
    ensemble.save(Path("models/self_training"))
    digest = file_digest("models/self_training/ensemble.safetensors")
    write_json("models/calibration.json", {"temperature": TEMPERATURE, "ensemble": digest})


def write_details(folder: Path) -> None:
    """details.json and metrics.json as evaluate writes them, of predictions that are not these models'."""
    with tempfile.TemporaryDirectory() as temporary:
        with contextlib.chdir(ROOT):
            fabricate(Path(temporary), frames=False)
        with contextlib.chdir(temporary):
            p = load()
            details = figures.details(read_run(p.corpus.labels), p)
    write_json(folder / "details.json", details | {"seeds": len(SEEDS), "folds": FOLDS})
    write_json(folder / "metrics.json", figures.headline(details))


def make_ensemble(name: str = "attention", segments: tuple[int, ...] = (), **changes: int) -> Ensemble:
    """Fold models that were never trained, but differ, each with a standardisation of its own, for the repository that
    is the working directory. changes: of DIMENSIONS.
    """
    p = load()
    labels = tuple(p.corpus.labels)
    learned_from = {name: {"loaded": loaded_digest(p.extractors[name]).hex()} for name in DIMENSIONS}
    dimensions = {**DIMENSIONS, **changes}
    architecture = Architecture(name, tuple(dimensions), tuple(dimensions.values()), len(labels), hidden=32,
                                dropout=0.3, modality_dropout=0.3, keep_one=True, segments=segments)
    torch.manual_seed(0)
    models = [architecture.build().state_dict() for _ in range(len(SEEDS) * FOLDS)]
    weights = {name: torch.stack([model[name] for model in models]).unflatten(0, (len(SEEDS), FOLDS))
               for name in models[0]}
    generator = torch.Generator().manual_seed(2)
    statistics = {
        name: (torch.randn(FOLDS, size, generator=generator), 0.1 + torch.rand(FOLDS, size, generator=generator))
        for name, size in dimensions.items()
    }
    return Ensemble(architecture, labels, SEEDS, weights, statistics, learned_from)
