"""The fusion's inputs: every clip's pooled features, resident on one device, with labels, splits and folds.

A modality's matrix is kept as (x - centre) / spread, centre and spread per dimension over the labelled clips, and
in half precision once a corpus is large: 120,625 clips x 14,592 dimensions are 3.5 GB instead of 7.0. Centred
first, half precision keeps three digits of what tells clips apart, however large a dimension's offset. It is only
a number format: Standardised undoes it in the multiply-add that standardises for a fold, so no fold sees the
statistics of its validation part.
"""

import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.engine.devices import cores, lanes
from stages.engine.errors import PipelineError
from stages.engine.manifest import Clip, read_folds, read_manifest
from stages.engine.store import Store

MODALITIES = Path("data/modalities.json")
HALF_ABOVE = 2 << 30  # bytes of float32 features from which on they are kept as float16
# A dimension whose deviation is below this share of its mean counts as constant. Float32 features move by 5e-7 of their
# size with the batch they are computed in, by more in half precision: what varies less than 200 times that is not
# standardised up to the size of what tells clips apart.
CONSTANT = 1e-4

Statistics = dict[str, tuple[Tensor, Tensor]]  # modality -> mean (F, D), scale (F, D), float32, of raw features


@dataclass(frozen=True)
class Modality:
    """One modality of all N clips. G is 1, or the number of folds where each fold has features of its own."""

    name: str
    matrix: Tensor  # (G, N, D) float32 or float16, centred and scaled; absent clips are zeros
    centre: Tensor  # (G, D) float32
    spread: Tensor  # (G, D) float32, never 0
    present: Tensor  # (N,) bool
    source: dict[str, Any] = field(default_factory=dict, kw_only=True)  # its entry in data/modalities.json

    @property
    def dimension(self) -> int:
        return self.matrix.shape[-1]


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
    no labelled clips, and for a class without any.
    """
    clips = read_manifest()
    clip_ids = [clip.clip_id for clip in clips]
    splits = np.array([clip.split for clip in clips], dtype=np.str_)
    labels, folds = _labels_and_folds(clips, label_names)
    entries = {entry["name"]: entry for entry in _read_json(MODALITIES)["modalities"]}
    for name in modalities:
        if name not in entries:
            raise PipelineError(f"{MODALITIES}: found no modality {name!r}, expected one of {sorted(entries)}")
    count = int(folds.max()) + 1
    numbers = sum(_dimension(entries[name]) * (count if entries[name]["per_fold"] else 1) for name in modalities)
    dtype = torch.float16 if numbers * len(clips) * 4 > HALF_ABOVE else torch.float32
    loaded = (_load_modality(entries[n], clip_ids, splits == "labelled", count, dtype, device) for n in modalities)
    return Inputs(clip_ids, splits, labels, folds, tuple(label_names), tuple(loaded))


def _labels_and_folds(clips: Sequence[Clip], label_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Class and fold of every clip, (N,) int64 each, -1 unless labelled."""
    index, by_clip = {name: i for i, name in enumerate(label_names)}, read_folds()
    labels, folds = np.full(len(clips), -1, np.int64), np.full(len(clips), -1, np.int64)
    for row, clip in enumerate(clips):
        if clip.split != "labelled":
            continue
        if clip.label not in index:
            raise PipelineError(f"data/manifest.csv: clip {clip.clip_id}: label {clip.label!r}, expected one of "
                                f"{list(label_names)}")
        if clip.clip_id not in by_clip:
            raise PipelineError(f"data/folds.csv: found no fold for the labelled clip {clip.clip_id}")
        labels[row], folds[row] = index[clip.label], by_clip[clip.clip_id]
    if (labels < 0).all():
        raise PipelineError("data/manifest.csv: found no labelled clips; the fusion needs some to learn from")
    sizes = np.bincount(folds[folds >= 0])
    if len(sizes) < 2 or not sizes.all():
        raise PipelineError(f"data/folds.csv: found {sizes.tolist()} clips per fold, expected two folds or more, none "
                            f"of them empty")
    for name, count in zip(label_names, np.bincount(labels[labels >= 0], minlength=len(label_names)), strict=True):
        if not count:  # fewer than there are folds is what folds by group may bring; split_folds warns of that
            raise PipelineError(f"data/manifest.csv: found no labelled clip of class {name!r}, expected some; leave "
                                f"the class out of corpus.labels")
    return labels, folds


def _load_modality(
    entry: dict[str, Any], clip_ids: list[str], labelled: np.ndarray, folds: int, dtype: torch.dtype, device: str
) -> Modality:
    """`labelled`: (N,) bool. Where the entry is per fold the store's mean holds every fold's features in turn."""
    store = Store(entry["folder"])
    groups = folds if entry["per_fold"] else 1
    _check_store(store, groups, clip_ids)
    present = store.present
    if not present[labelled].any():
        raise PipelineError(f"{store.folder}: found no labelled clip with features, expected some to learn from")
    dimension, names, limit = int(entry["dimension"]), entry["statistics"], torch.finfo(dtype).max
    if store.dimension != groups * dimension:
        raise PipelineError(f"{store.folder}: features have dimension {store.dimension / groups:g}, expected "
                            f"{dimension} ({MODALITIES})")
    matrix = torch.empty(groups, len(clip_ids), _dimension(entry), dtype=dtype)
    centre, spread = torch.empty(groups, matrix.shape[-1]), torch.empty(groups, matrix.shape[-1])
    places = [(i, group, slice(i * dimension, (i + 1) * dimension), slice(group * dimension, (group + 1) * dimension))
              for i in range(len(names)) for group in range(groups)]  # columns in the matrix, and in the store

    # Twice over the shards, so that what is not yet in the matrix is in memory a shard at a time.
    known = present & labelled
    parts = [[values[known[part]] for values in read] for part, read in store.statistics(names, known)]
    found = [np.concatenate(column) for column in zip(*parts, strict=True)]
    for i, group, to, source in places:
        centre[group, to], spread[group, to] = _location_and_scale(torch.from_numpy(found[i][:, source]))

    def convert(part: slice, read: list[np.ndarray]) -> None:
        absent = torch.from_numpy(np.flatnonzero(~present[part]))
        for values in read:
            _check_finite(values, store, part.start)
        for i, group, to, source in places:
            block = torch.from_numpy(read[i][:, source]).sub_(centre[group, to]).div_(spread[group, to])
            matrix[group, part, to] = block.clamp_(-limit, limit).index_fill_(0, absent, 0)

    tasks: deque[Future[None]] = deque()
    with lanes(cores()) as pool:  # this thread reads ahead of those that convert, by a few shards
        for shard in store.statistics(names):
            tasks.append(pool.submit(convert, *shard))
            if len(tasks) > 2 * cores():
                tasks.popleft().result()
        for task in tasks:
            task.result()
    tensors = (tensor.to(device) for tensor in (matrix, centre, spread, torch.from_numpy(present)))
    return Modality(entry["name"], *tensors, source=entry)


def _check_finite(values: np.ndarray, store: Store, start: int) -> None:
    """Raise PipelineError for a clip with NaN or infinite features; `start` is the row of the first of the values."""
    with np.errstate(over="ignore", invalid="ignore"):
        suspects = np.flatnonzero(~np.isfinite(values.sum(axis=1)))  # a third of the time of looking at each number
    for row in suspects:
        if not np.isfinite(values[row]).all():
            raise PipelineError(f"{store.folder}: clip {store.clip_ids[start + row]} holds NaN or infinite features, "
                                f"expected numbers")


def _dimension(entry: dict[str, Any]) -> int:
    return int(entry["dimension"]) * len(entry["statistics"])


def _check_store(store: Store, folds: int, clip_ids: list[str]) -> None:
    found = int(store.attrs.get("folds", 1))
    if found != folds:
        raise PipelineError(f"{store.folder}: features of {found} folds, expected {folds} (data/folds.csv)")
    if store.clip_ids != clip_ids:
        have, expected = set(store.clip_ids), set(clip_ids)
        what = f"lacks {min(expected - have)}" if expected - have else "has other clips or another order"
        raise PipelineError(f"{store.folder}: {what}, expected the {len(clip_ids)} clips of data/manifest.csv in its "
                            f"order")


def _location_and_scale(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation per column of (n, D), float64; for a constant column its size in place of the deviation, so
    that next to nothing is left of it, and 1 for zeros."""
    variance, mean = torch.var_mean(values.double(), dim=0, correction=0)
    deviation, size = variance.sqrt(), mean.abs()
    return mean, torch.where(deviation > CONSTANT * size, deviation, torch.where(size > 0, size, 1.0))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: can't be read ({error}); run dvc repro") from None


# ---------------------------------------------------------------- standardisation


def fold_statistics(inputs: Inputs, standardize: bool) -> Statistics:
    """Mean and scale of each fold's training part: labelled clips of the other folds that have the modality.

    Without `standardize` mean 0 and scale 1 throughout. Pseudo-labelled clips do not count: the same statistics serve
    all rounds of self-training.
    """
    statistics = {}
    for modality in inputs.modalities:
        shape = (inputs.fold_count, modality.dimension)
        mean, scale = torch.zeros(shape, device=inputs.device), torch.ones(shape, device=inputs.device)
        for fold in range(inputs.fold_count if standardize else 0):
            group = fold % len(modality.matrix)
            rows = torch.from_numpy(np.flatnonzero((inputs.folds >= 0) & (inputs.folds != fold))).to(inputs.device)
            values = modality.matrix[group, rows[modality.present[rows]]].double()
            if len(values):
                mean[fold], scale[fold] = _location_and_scale(modality.centre[group] + modality.spread[group] * values)
        statistics[modality.name] = (mean, scale)
    return statistics


class Standardised:
    """Clips as a fold's models are fed them: standardised by the fold's statistics, absent modalities zeros."""

    def __init__(self, inputs: Inputs, statistics: Statistics, fold: int):
        self._parts = []
        for modality in inputs.modalities:
            group = fold % len(modality.matrix)
            mean, scale = (t[fold].to(inputs.device) for t in statistics[modality.name])
            factor, shift = modality.spread[group] / scale, (modality.centre[group] - mean) / scale
            self._parts.append((modality.name, group, modality.matrix[group], factor, shift))
        self._present = inputs.present

    def __call__(
        self, rows: Tensor, taken: dict[tuple[str, int], Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """rows: (B,) row numbers. Returns per modality (B, D) float32, and what is present, (B, modalities) bool.

        taken: the matrices' rows as float32, for the feeds of other folds that are given the same rows: to take them
        out of a half-precision matrix costs as much as to standardise them.
        """
        present, features = self._present[rows], []
        for i, (name, group, matrix, factor, shift) in enumerate(self._parts):
            raw = None if taken is None else taken.get((name, group))
            if raw is None:
                raw = matrix[rows].float()
                if taken is not None:
                    taken[name, group] = raw
            values = torch.addcmul(shift, raw, factor)
            features.append(values.mul_(present[:, i, None]))
        return features, present
