"""What the fusion is fed: every clip's pooled features, resident on one device, with labels, splits and folds.

A modality's matrix is kept as (x - centre) / spread, centre and spread per dimension over the labelled clips, and
in half precision once a corpus is large: 120,625 clips x 14,592 dimensions are 3.5 GB instead of 7.0. Centred
first, half precision keeps three digits of what tells clips apart, however large a dimension's offset. It is only
a number format: each fold's own standardisation undoes it in the same multiply-add, so no fold sees the
statistics of its validation part.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.engine.errors import PipelineError
from stages.engine.manifest import read_folds, read_manifest
from stages.engine.store import Store

MODALITIES = Path("data/modalities.json")
HALF_ABOVE = 2 << 30  # bytes of float32 features from which on they are kept as float16
BLOCK = 4096  # rows converted at a time
CONSTANT = 1e-6  # a deviation below this share of the values' size is rounding: the dimension is constant

Statistics = dict[str, tuple[Tensor, Tensor]]  # modality -> mean (F, D), scale (F, D), float32, of raw features


@dataclass(frozen=True)
class Modality:
    """One modality of all N clips. G is 1, or the number of folds where each fold has features of its own."""

    name: str
    matrix: Tensor  # (G, N, D) float32 or float16, centred and scaled; absent clips are zeros
    centre: Tensor  # (G, D) float32
    spread: Tensor  # (G, D) float32, never 0
    present: Tensor  # (N,) bool

    @property
    def dimension(self) -> int:
        return self.matrix.shape[-1]


NARROW_INPUT = 2048  # features in all, below which a second thread in an operation costs more than it brings


@dataclass(frozen=True)
class Inputs:
    """N clips in manifest order. Row numbers everywhere in the fusion count these."""

    clip_ids: list[str]
    splits: np.ndarray  # (N,) str: labelled, unlabelled or test
    labels: np.ndarray  # (N,) int64 class, -1 unless labelled
    folds: np.ndarray  # (N,) int64, -1 unless labelled
    label_names: tuple[str, ...]
    modalities: tuple[Modality, ...]

    @property
    def fold_count(self) -> int:
        return int(self.folds.max()) + 1

    @property
    def labelled(self) -> np.ndarray:
        """Rows of the labelled clips: the rows of out-of-fold predictions."""
        return np.flatnonzero(self.splits == "labelled")

    @property
    def others(self) -> np.ndarray:
        """Rows of the unlabelled and test clips: the rows of the fold models' votes."""
        return np.flatnonzero(self.splits != "labelled")

    @property
    def dimension(self) -> int:
        """Of all modalities together."""
        return sum(modality.dimension for modality in self.modalities)

    @property
    def device(self) -> torch.device:
        return self.modalities[0].matrix.device

    @property
    def present(self) -> Tensor:
        """(N, modalities) bool."""
        return torch.stack([modality.present for modality in self.modalities], dim=-1)

    def select(self, names: Sequence[str]) -> "Inputs":
        """The same clips with these modalities only; features are shared, not copied."""
        return replace(self, modalities=tuple(m for m in self.modalities if m.name in names))


def load_inputs(modalities: Sequence[str], label_names: Sequence[str], device: str = "cpu") -> Inputs:
    """Read the manifest, the folds and the named modalities' features of the run in the current folder.

    Raises PipelineError for an unknown modality, features of a wrong dimension, of other clips or with NaN, for
    no labelled clips, and for a class with fewer labelled clips than there are folds.
    """
    clips = read_manifest()
    clip_ids = [clip.clip_id for clip in clips]
    splits = np.array([clip.split for clip in clips], dtype=np.str_)
    labels = _label_indices(clip_ids, splits, [clip.label for clip in clips], label_names)
    folds = _fold_numbers(clip_ids, splits)
    _check_classes(labels, folds, label_names)
    entries = {entry["name"]: entry for entry in _read_json(MODALITIES)["modalities"]}
    for name in modalities:
        if name not in entries:
            raise PipelineError(f"{MODALITIES}: found no modality {name!r}, expected one of {sorted(entries)}")
    numbers = sum(_dimension(entries[n]) * (folds.max() + 1 if entries[n]["per_fold"] else 1) for n in modalities)
    dtype = torch.float16 if numbers * len(clips) * 4 > HALF_ABOVE else torch.float32
    loaded = [_load_modality(entries[n], clip_ids, splits == "labelled", folds.max() + 1, dtype) for n in modalities]
    on_device = tuple(_move(modality, device) for modality in loaded)
    return Inputs(clip_ids, splits, labels, folds, tuple(label_names), on_device)


def _label_indices(
    clip_ids: list[str], splits: np.ndarray, names: list[str], label_names: Sequence[str]
) -> np.ndarray:
    index = {name: i for i, name in enumerate(label_names)}
    labels = np.full(len(clip_ids), -1, np.int64)
    for row in np.flatnonzero(splits == "labelled"):
        if names[row] not in index:
            raise PipelineError(
                f"data/manifest.csv: clip {clip_ids[row]}: label {names[row]!r}, expected one of {list(label_names)}"
            )
        labels[row] = index[names[row]]
    if (labels < 0).all():
        raise PipelineError("data/manifest.csv: found no labelled clips; the fusion needs some to learn from")
    return labels


def _fold_numbers(clip_ids: list[str], splits: np.ndarray) -> np.ndarray:
    by_clip = read_folds()
    folds = np.full(len(clip_ids), -1, np.int64)
    for row in np.flatnonzero(splits == "labelled"):
        if clip_ids[row] not in by_clip:
            raise PipelineError(f"data/folds.csv: found no fold for the labelled clip {clip_ids[row]}")
        folds[row] = by_clip[clip_ids[row]]
    counts = np.bincount(folds[folds >= 0])
    if len(counts) < 2 or not counts.all():
        raise PipelineError(
            f"data/folds.csv: found {counts.tolist()} clips per fold, expected two folds or more, none of them empty"
        )
    return folds


def _check_classes(labels: np.ndarray, folds: np.ndarray, label_names: Sequence[str]) -> None:
    counts = np.bincount(labels[labels >= 0], minlength=len(label_names))
    for name, count in zip(label_names, counts, strict=True):
        if count <= folds.max():
            raise PipelineError(
                f"data/manifest.csv: class {name!r} has {count} labelled clips, expected at least one per fold "
                f"({folds.max() + 1}); lower folds.count or leave the class out of corpus.labels"
            )


def _load_modality(
    entry: dict[str, Any], clip_ids: list[str], labelled: np.ndarray, folds: int, dtype: torch.dtype
) -> Modality:
    folder = Path(entry["folder"])
    store = _open(folder, entry, clip_ids)
    groups = store.attrs["folds"] if entry["per_fold"] else 1
    if entry["per_fold"] and groups != folds:
        raise PipelineError(f"{folder}: features of {groups} folds, expected {folds} (data/folds.csv); run dvc repro")
    matrix = torch.empty(groups, len(clip_ids), _dimension(entry), dtype=dtype)
    centre, spread = torch.empty(groups, matrix.shape[-1]), torch.empty(groups, matrix.shape[-1])
    present = store.present
    if not present[labelled].any():
        raise PipelineError(f"{folder}: found no labelled clip with features, expected some to learn from")
    for i, statistic in enumerate(entry["statistics"]):
        columns = slice(i * entry["dimension"], (i + 1) * entry["dimension"])
        values = getattr(store, statistic).reshape(len(clip_ids), groups, -1)
        for group in range(groups):
            scales = _fill(matrix[group, :, columns], values[:, group], present, labelled, store)
            centre[group, columns], spread[group, columns] = scales
    return Modality(entry["name"], matrix, centre, spread, torch.from_numpy(present))


def _fill(
    matrix: Tensor, values: np.ndarray, present: np.ndarray, labelled: np.ndarray, store: Store
) -> tuple[Tensor, Tensor]:
    """Write a statistic's values (N, C), centred and scaled, to matrix; return centre and spread (C,) float32."""
    centre, spread = _location_and_scale(values[present & labelled])
    limit = torch.finfo(matrix.dtype).max
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if bad.size:
            clip = store.clip_ids[start + bad[0]]
            raise PipelineError(f"{store.folder}: clip {clip} holds NaN or infinite features, expected numbers")
        block = (block - centre) / spread
        block[~present[start : start + BLOCK]] = 0
        matrix[start : start + BLOCK] = torch.from_numpy(block).clamp_(-limit, limit)
    return torch.from_numpy(centre), torch.from_numpy(spread)


def _dimension(entry: dict[str, Any]) -> int:
    return int(entry["dimension"]) * len(entry["statistics"])


def _open(folder: Path, entry: dict[str, Any], clip_ids: list[str]) -> Store:
    store = Store(folder)
    if store.attrs.get("dimension") != entry["dimension"]:
        raise PipelineError(
            f"{folder}: features have dimension {store.attrs.get('dimension')}, expected {entry['dimension']} "
            f"({MODALITIES})"
        )
    if store.clip_ids != clip_ids:
        found, expected = set(store.clip_ids), set(clip_ids)
        what = f"lacks {min(expected - found)}" if expected - found else "has other clips or another order"
        raise PipelineError(f"{folder}: {what}, expected the {len(clip_ids)} clips of data/manifest.csv in its order")
    return store


def _location_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per column, float32; the deviation of a constant column is 1."""
    with np.errstate(invalid="ignore", over="ignore"):  # NaN is found, with its clip, when the block is read
        mean = values.mean(axis=0, dtype=np.float64)
        deviation = values.std(axis=0, dtype=np.float64)
        deviation[~(deviation > CONSTANT * np.abs(mean))] = 1
    return mean.astype(np.float32), deviation.astype(np.float32)


def _move(modality: Modality, device: str) -> Modality:
    tensors = {name: getattr(modality, name).to(device) for name in ("matrix", "centre", "spread", "present")}
    return replace(modality, **tensors)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: can't be read ({error}); run dvc repro") from None


# ---------------------------------------------------------------- standardisation


def fold_statistics(inputs: Inputs, standardize: bool) -> Statistics:
    """Mean and scale of each fold's training part: labelled clips of the other folds that have the modality.

    A constant dimension gets scale 1. Without `standardize` mean 0 and scale 1 throughout. Pseudo-labelled clips
    do not count: the same statistics serve all rounds of self-training.
    """
    statistics = {}
    for modality in inputs.modalities:
        shape = (inputs.fold_count, modality.dimension)
        mean, scale = torch.zeros(shape, device=inputs.device), torch.ones(shape, device=inputs.device)
        for group in range(len(modality.matrix) if standardize else 0):
            sums = torch.stack([_sums(inputs, modality, group, fold) for fold in range(inputs.fold_count)])
            for fold in range(inputs.fold_count) if len(modality.matrix) == 1 else [group]:
                counts, total, squares = sums[torch.arange(inputs.fold_count) != fold].sum(dim=0)
                middle = total / counts.clamp(min=1)
                deviation = (squares / counts.clamp(min=1) - middle.square()).clamp(min=0).sqrt()
                spread = modality.spread[group].double()
                mean[fold] = (modality.centre[group] + spread * middle).float()
                scale[fold] = torch.where(deviation > CONSTANT, spread * deviation, 1.0).float()
        statistics[modality.name] = (mean, scale)
    return statistics


def _sums(inputs: Inputs, modality: Modality, group: int, fold: int) -> Tensor:
    """Count, sum and sum of squares over the fold's clips that have the modality: (3, D) float64."""
    rows = torch.from_numpy(np.flatnonzero(inputs.folds == fold)).to(inputs.device)
    sums = torch.zeros(3, modality.dimension, dtype=torch.float64, device=inputs.device)
    for block in rows[modality.present[rows]].split(BLOCK // 8):
        values = modality.matrix[group, block].double()
        sums += torch.stack([torch.full_like(sums[0], len(block)), values.sum(dim=0), values.square().sum(dim=0)])
    return sums


def affine(modality: Modality, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), each (F, D) float32, with matrix * a + b = (raw features - mean) / scale for mean, scale (F, D)."""
    return modality.spread / scale, (modality.centre - mean) / scale
