"""The fusion's inputs: every clip's pooled features, resident on one device, with labels, splits and folds.

A modality's matrix is kept as (x - centre) / spread, centre and spread per dimension over the labelled clips, and
in half precision once a corpus is large: 120,625 clips x 14,592 dimensions are 3.5 GB instead of 7.0. Centred
first, half precision keeps three digits of what tells clips apart, however large a dimension's offset. It is only
a number format: Standardised undoes it in the multiply-add that standardises for a fold, so no fold sees the
statistics of its validation part; nor does standardising by group, but for the groups that lie in it.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.engine.devices import cores, lanes
from stages.engine.errors import PipelineError
from stages.engine.files import write_rows
from stages.engine.manifest import Clip, read_folds, read_manifest
from stages.engine.params import Fusion
from stages.engine.store import Store
from stages.fusion.segments import stored_segments

MODALITIES = Path("data/modalities.json")
HALF_ABOVE = 2 << 30  # bytes of float32 features from which on they are kept as float16
# A dimension whose deviation is below this share of its mean counts as constant. Float32 features move by 5e-7 of their
# size with the batch they are computed in, by more in half precision: what varies less than 200 times that is not
# standardised up to the size of what tells clips apart.
CONSTANT = 1e-4
# Present clips that a group must have for a mean and deviation of its own [choice]: of ten the deviation is known to a
# quarter. Clips of smaller groups, and those of none, are standardised by the fold's training part.
GROUP_MINIMUM = 10

# modality -> mean and scale of raw features, float32: (F, D) by fold; by group (G, groups, D), where a scale of 0 says
# that too few clips of the group have the modality
Statistics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Modality:
    """One modality of all N clips. G is 1, or the number of folds where each fold has features of its own."""

    name: str
    matrix: Tensor  # (G, N, D) float32 or float16, centred and scaled; absent clips are zeros
    centre: Tensor  # (G, D) float32
    spread: Tensor  # (G, D) float32, never 0
    present: Tensor  # (N,) bool
    segments: int = field(default=1, kw_only=True)  # parts of time that D consists of
    source: dict[str, Any] = field(default_factory=dict, kw_only=True)  # its entry in data/modalities.json

    @property
    def dimension(self) -> int:
        return self.matrix.shape[-1]


@dataclass(frozen=True)
class Inputs:
    """N clips in manifest order. Row numbers everywhere in the fusion count these."""

    clip_ids: list[str]
    splits: np.ndarray  # (N,) str: labelled, unlabelled or test; any other takes no part
    labels: np.ndarray  # (N,) int64 class, -1 unless labelled
    folds: np.ndarray  # (N,) int64, -1 unless labelled
    label_names: tuple[str, ...]
    modalities: tuple[Modality, ...]
    groups: np.ndarray | None = None  # (N,) int64 number of the clip's group, -1: none or a small one; None: unknown
    digests: Sequence[str] = ()  # (N,) of the clips' content, "" where unknown

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
        return np.flatnonzero(np.isin(self.splits, ("unlabelled", "test")))

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


def load_inputs(
    modalities: Sequence[str], label_names: Sequence[str], device: str = "cpu", segments: int | None = None
) -> Inputs:
    """Read the manifest, the folds and the named modalities' features of the run in the current folder: pooled ones, or
    with `segments` (architectures.segments_read) those over time, in so many parts.

    Raises PipelineError for an unknown modality, features of a wrong dimension, of other clips or with NaN, for
    features over time that were not kept, for no labelled clips, and for a class without any.
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
    parts = {name: _segments(entries[name], segments) for name in modalities}
    numbers = sum(_dimension(entries[name], part) * (count if entries[name]["per_fold"] else 1)
                  for name, part in parts.items())
    dtype = torch.float16 if numbers * len(clips) * 4 > HALF_ABOVE else torch.float32
    loaded = (_load_modality(entries[name], clip_ids, splits == "labelled", count, dtype, device, parts[name])
              for name in modalities)
    groups, digests = number_groups([clip.group for clip in clips]), [clip.digest for clip in clips]
    return Inputs(clip_ids, splits, labels, folds, tuple(label_names), tuple(loaded), groups, digests)


def write_clips(folder: Path, inputs: Inputs) -> None:
    """clips.csv: clip_id and split of the rows of predictions, labelled clips first, then the others."""
    rows = [*inputs.labelled, *inputs.others]
    write_rows(folder / "clips.csv", ["clip_id", "split"], [(inputs.clip_ids[row], inputs.splits[row]) for row in rows])


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


def number_groups(names: Sequence[str]) -> np.ndarray:
    """(N,) int64: the groups of GROUP_MINIMUM clips or more, whatever their split, numbered by name; else -1."""
    found, index, counts = np.unique(np.array(names, dtype=np.str_), return_inverse=True, return_counts=True)
    usable = (counts >= GROUP_MINIMUM) & (found != "")
    return np.where(usable, usable.cumsum() - 1, -1)[index]


def group_of_digest(inputs: Inputs) -> dict[str, int]:
    """By what a clip holds, the number of its group or -1; of the first clip where several hold the same."""
    known: dict[str, int] = {}
    if inputs.groups is not None:
        for digest, number in zip(inputs.digests, inputs.groups.tolist(), strict=False):
            if digest:
                known.setdefault(digest, number)
    return known


def _load_modality(
    entry: dict[str, Any], clip_ids: list[str], labelled: np.ndarray, folds: int, dtype: torch.dtype, device: str,
    segments: int | None,
) -> Modality:
    """`labelled`: (N,) bool. Where the entry is per fold the store's mean holds every fold's features in turn."""
    store = Store(entry["folder"])
    groups = folds if entry["per_fold"] else 1
    _check_store(store, groups, clip_ids)
    present = store.present
    if not present[labelled].any():
        raise PipelineError(f"{store.folder}: found no labelled clip with features, expected some to learn from")
    dimension, limit = int(entry["dimension"]), torch.finfo(dtype).max
    if store.dimension != groups * dimension:
        raise PipelineError(f"{store.folder}: features have dimension {store.dimension / groups:g}, expected "
                            f"{dimension} ({MODALITIES})")
    names, width = entry["statistics"], dimension
    shards: Callable[..., Iterable[tuple[slice, list[np.ndarray]]]] = partial(store.statistics, names)
    if segments:
        whole = [(slice(0, len(clip_ids)), [stored_segments(store, segments, groups)])]
        names, width, shards = ["segments"], dimension * segments, lambda _=None: whole
    matrix = torch.empty(groups, len(clip_ids), _dimension(entry, segments), dtype=dtype)
    centre, spread = torch.empty(groups, matrix.shape[-1]), torch.empty(groups, matrix.shape[-1])
    places = [(i, group, slice(i * width, (i + 1) * width), slice(group * width, (group + 1) * width))
              for i in range(len(names)) for group in range(groups)]  # columns in the matrix, and in the store

    # Twice over the shards, so that what is not yet in the matrix is in memory a shard at a time.
    known = present & labelled
    parts = [[values[known[part]] for values in read] for part, read in shards(known)]
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
        for shard in shards():
            tasks.append(pool.submit(convert, *shard))
            if len(tasks) > 2 * cores():
                tasks.popleft().result()
        for task in tasks:
            task.result()
    tensors = (tensor.to(device) for tensor in (matrix, centre, spread, torch.from_numpy(present)))
    return Modality(entry["name"], *tensors, segments=segments or 1, source=entry)


def _check_finite(values: np.ndarray, store: Store, start: int) -> None:
    """Raise PipelineError for a clip with NaN or infinite features; `start` is the row of the first of the values."""
    with np.errstate(over="ignore", invalid="ignore"):
        suspects = np.flatnonzero(~np.isfinite(values.sum(axis=1)))  # a third of the time of looking at each number
    for row in suspects:
        if not np.isfinite(values[row]).all():
            raise PipelineError(f"{store.folder}: clip {store.clip_ids[start + row]} holds NaN or infinite features, "
                                f"expected numbers")


def _dimension(entry: dict[str, Any], segments: int | None) -> int:
    return int(entry["dimension"]) * (segments or len(entry["statistics"]))


def _segments(entry: dict[str, Any], segments: int | None) -> int | None:
    """Into how many parts of time the modality is cut; None: it is pooled. PipelineError where that takes frames that
    were not kept."""
    if segments and not entry["frames"]:
        if "var" in entry["statistics"]:
            raise PipelineError(f"{entry['folder']}: holds no features over time, which fusion.architecture asks for; "
                                f"set extractors.{entry['name']}.keep_frames: true and run dvc repro (imported "
                                f"features: mer import-features --keep-frames, from files of shape (frames, C))")
        return None  # without a variance over time it is one vector by nature
    return segments


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


def fold_statistics(inputs: Inputs, recipe: Fusion) -> Statistics:
    """Mean and scale of each fold's training part: labelled clips of the other folds that have the modality.

    Mean 0 and scale 1 throughout for a modality that recipe.standardize leaves as it is. Pseudo-labelled clips do not
    count: the same statistics serve all rounds of self-training.
    """
    statistics = {}
    for modality in inputs.modalities:
        shape = (inputs.fold_count, modality.dimension)
        mean, scale = torch.zeros(shape, device=inputs.device), torch.ones(shape, device=inputs.device)
        for fold in range(0 if recipe.standardized_by(modality.name) == "none" else inputs.fold_count):
            group = fold % len(modality.matrix)
            rows = torch.from_numpy(np.flatnonzero((inputs.folds >= 0) & (inputs.folds != fold))).to(inputs.device)
            values = modality.matrix[group, rows[modality.present[rows]]].double()
            if len(values):
                mean[fold], scale[fold] = _location_and_scale(modality.centre[group] + modality.spread[group] * values)
        statistics[modality.name] = (mean, scale)
    return statistics


def group_statistics(inputs: Inputs, names: Sequence[str]) -> Statistics:
    """Mean and scale of every group of clips in these modalities, over its labelled, unlabelled and test clips that are
    present: no label is used, but a clip's features depend on what else its group holds (transductive).

    A modality in which no group has GROUP_MINIMUM of them is left out: all its clips are standardised by the fold.
    """
    numbers, statistics = inputs.groups, {}
    if numbers is None or numbers.max(initial=-1) < 0:
        return {}
    order, sizes = np.argsort(numbers, kind="stable"), np.bincount(numbers + 1)
    members = np.split(order, sizes.cumsum()[:-1])[1:]  # without those of no group
    for modality in (m for m in inputs.modalities if m.name in names):
        shape = (len(modality.matrix), len(members), modality.dimension)
        mean, scale = (torch.zeros(shape, device=inputs.device) for _ in range(2))
        for number, of_group in enumerate(members):
            rows = torch.from_numpy(of_group).to(inputs.device)
            rows = rows[modality.present[rows]]
            for i in range(shape[0] if len(rows) >= GROUP_MINIMUM else 0):
                raw = modality.centre[i] + modality.spread[i] * modality.matrix[i, rows].double()
                mean[i, number], scale[i, number] = _location_and_scale(raw)
        if scale.any():
            statistics[modality.name] = (mean, scale)
    return statistics


class Standardised:
    """Clips as a fold's models are fed them: standardised by their group's statistics or the fold's, absent modalities
    zeros. groups: of the modalities that are standardised by group, as group_statistics gives them.
    """

    def __init__(self, inputs: Inputs, statistics: Statistics, fold: int, groups: Statistics | None = None):
        self.device, self._parts, self._own = inputs.device, [], {}
        self._numbers = None if inputs.groups is None else torch.from_numpy(inputs.groups).to(inputs.device)
        for modality in inputs.modalities:
            group = fold % len(modality.matrix)
            mean, scale = (t[fold].to(inputs.device) for t in statistics[modality.name])
            factor, shift = modality.spread[group] / scale, (modality.centre[group] - mean) / scale
            self._parts.append((modality.name, group, modality.matrix[group], factor, shift))
            if groups and modality.name in groups and self._numbers is not None:
                own = (t[fold % len(t)].to(inputs.device) for t in groups[modality.name])
                self._own[modality.name] = (modality.centre[group], modality.spread[group], *own)
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
            if name in self._own:
                values = self._by_group(name, rows, raw, values)
            features.append(values.mul_(present[:, i, None]))
        return features, present

    def _by_group(self, name: str, rows: Tensor, kept: Tensor, by_fold: Tensor) -> Tensor:
        """(B, D): `kept`, numbers of the matrix, by each clip's group; by_fold where that has no statistics."""
        assert self._numbers is not None
        centre, spread, means, scales = self._own[name]
        numbers = self._numbers[rows]
        mean, scale = means[numbers], scales[numbers]  # of -1 the last group's, which does not count
        own = torch.addcmul((centre - mean) / scale, kept, spread / scale)
        return torch.where((numbers >= 0)[:, None] & (scale > 0), own, by_fold)
