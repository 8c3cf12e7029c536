"""Small inputs for the fusion's tests: in memory, and as a run's files with real feature stores."""

import json
from pathlib import Path

import numpy as np
import torch
from ruamel.yaml import YAML

from stages.engine.files import write_rows
from stages.engine.manifest import Clip, write_manifest
from stages.engine.params import Fusion, Pretraining, SelfTraining
from stages.engine.store import Row, Store, write_index, write_shard
from stages.fusion.features import Inputs, Modality
from stages.gather_features import describe_modality

ROOT = Path(__file__).parent.parent
LABELS = ("neutral", "anger", "happiness", "sadness")


def recipe(**changes) -> Fusion:
    """A small fusion; `changes` override."""
    small = {
        "modalities": ["sound", "face", "prompt"],
        "architecture": "attention",
        "standardize": "fold",
        "modality_dropout": 0.3,
        "keep_one": True,
        "segments": 4,
        "hidden": 16,
        "dropout": 0.3,
        "epochs": 3,
        "epoch": "best",
        "batch_size": 16,
        "learning_rate": 0.003,
        "optimizer": "adam",
        "weight_decay": 0.0,
        "class_weights": "none",
        "label_smoothing": 0.0,
        "feature_noise": 0.0,
        "mixup": 0.0,
        "seeds": [0, 7],
    }
    return Fusion(**{**small, **changes})


def rounds(**changes) -> SelfTraining:
    """Two rounds of two per class; `changes` override."""
    small = {"rounds": 2, "k": 2, "voters": "ensemble", "pool": "accumulate", "threshold": 0, "agreement": 0,
             "voices": [], "include_test": True, "select": "last"}
    return SelfTraining(**{**small, **changes})


def pretraining(**changes) -> Pretraining:
    """Short; `changes` override."""
    small = {"method": "contrastive", "epochs": 4, "temperature": 0.1, "batch_size": 16, "learning_rate": 0.003}
    return Pretraining(**{**small, **changes})


def write_params(fusion: Fusion, self_training: SelfTraining, before: Pretraining | None = None) -> None:
    """The repository's params.yaml in the current folder, with these sections, LABELS and an extractor per modality."""
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load(ROOT / "params.yaml")
    content["corpus"]["labels"] = list(LABELS)
    content["extractors"] = dict.fromkeys(fusion.modalities, content["extractors"]["hubert"])
    content["fusion"], content["self_training"] = fusion.model_dump(), self_training.model_dump()
    content["pretraining"] = (before or pretraining(method="off")).model_dump()
    content["runtime"]["device"] = "cpu"
    with open("params.yaml", "w") as file:
        yaml.dump(content, file)


def make_inputs(
    labelled=60, unlabelled=30, test=14, noise=1.0, folds=3, seed=0, absent=0.1
) -> tuple[Inputs, np.ndarray]:
    """Inputs of three modalities, and every clip's true class.

    Classes lie apart by the noise's inverse. `prompt` has features of its own per fold; folds are of unequal size;
    some clips lack `sound` or `face`. Splits are mixed, as in a manifest.
    """
    generator = np.random.default_rng(seed)
    splits = generator.permutation(np.repeat(["labelled", "unlabelled", "test"], [labelled, unlabelled, test]))
    clips = len(splits)
    truth = np.arange(clips) % len(LABELS)
    is_labelled = splits == "labelled"
    fold = np.full(clips, -1)
    fold[is_labelled] = generator.choice(folds, labelled, p=np.arange(1, folds + 1) / sum(range(1, folds + 1)))
    modalities = []
    for name, dimension, groups in (("sound", 10, 1), ("face", 7, 1), ("prompt", 5, folds)):
        means = generator.normal(size=(groups, len(LABELS), dimension))
        raw = 3 + means[:, truth] + noise * generator.normal(size=(groups, clips, dimension))
        present = np.ones(clips, bool) if groups > 1 else generator.random(clips) >= absent
        centre, spread = raw.mean(axis=1), raw.std(axis=1)
        matrix = (raw - centre[:, None]) / spread[:, None] * present[:, None]
        matrix, centre, spread = (torch.tensor(array, dtype=torch.float32) for array in (matrix, centre, spread))
        modalities.append(Modality(name, matrix, centre, spread, torch.from_numpy(present)))
    names = [f"clip_{i:03d}" for i in range(clips)]
    inputs = Inputs(names, splits, np.where(is_labelled, truth, -1), fold, LABELS, tuple(modalities))
    return inputs, truth


def tiled(inputs: Inputs, p: Fusion) -> np.ndarray:
    """The labelled clips' classes for each model, (S, F, N), as `train` takes them."""
    return np.tile(inputs.labels, (len(p.seeds), inputs.fold_count, 1))


def raw_features(modality: Modality, fold: int) -> np.ndarray:
    """(N, D) float64 features as they were before loading; absent clips are the centre."""
    group = fold % len(modality.matrix)
    spread, centre = modality.spread[group].double(), modality.centre[group].double()
    return (modality.matrix[group].double() * spread + centre).numpy()


def write_run(root: Path, inputs: Inputs) -> None:
    """Write manifest, folds, feature stores and modalities.json as the stages before the fusion leave them.

    `face` gets a variance (its squares) besides its mean; the others have means only.
    """
    for folder in ("data", "reports"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_manifest(
        (
            Clip(name, f"{name}.mp4", split, LABELS[label] if split == "labelled" else "", "", "", 1.0, 1, "0" * 64)
            for name, split, label in zip(inputs.clip_ids, inputs.splits.tolist(), inputs.labels, strict=True)
        ),
        root / "data/manifest.csv",
    )
    rows = [(inputs.clip_ids[row], inputs.folds[row]) for row in inputs.labelled]
    write_rows(root / "data/folds.csv", ["clip_id", "fold"], rows)
    entries = [_write_modality(root, inputs, modality) for modality in inputs.modalities]
    write_rows(root / "data/voices.csv", ["clip_id", "voice", "label"], [])
    (root / "data/modalities.json").write_text(json.dumps({"modalities": entries}))


def _write_modality(root: Path, inputs: Inputs, modality: Modality) -> dict:
    variance, groups = modality.name == "face", len(modality.matrix)
    folder = Path("features") / modality.name
    values = np.concatenate([raw_features(modality, fold) for fold in range(groups)], axis=1).astype(np.float32)
    rows = [
        Row(name, mean=value, var=value**2 if variance else None) if present else Row(name, reason="none")
        for name, value, present in zip(inputs.clip_ids, values, modality.present, strict=True)
    ]
    attributes = {"dimension": modality.dimension, "variance": variance, "folds": groups, "fingerprint": "test"}
    write_shard(root / folder / "shard-00000.h5", "features", rows, attributes)
    write_index(root / folder, ["shard-00000.h5"])
    return describe_modality(modality.name, Store(root / folder)) | {"folder": str(folder)}
