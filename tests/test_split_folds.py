"""Folds: stratified, seeded, and a group is never split."""

from collections import Counter

import pytest

from stages.engine.errors import PipelineError
from stages.engine.manifest import Clip
from stages.split_folds import split


def clips(counts: dict[str, int], group_size: int = 0) -> list[Clip]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [
        Clip(f"c{i}", "", "labelled", label, "", f"g{i // group_size}" if group_size else "", None, 0, "")
        for i, label in enumerate(labels)
    ]


def test_folds_are_stratified_and_seeded() -> None:
    corpus = clips({"neutral": 50, "anger": 25, "worry": 10})
    folds = split(corpus, 5, seed=0)
    assert folds == split(corpus, 5, seed=0) != split(corpus, 5, seed=1)
    for fold in range(5):
        inside = Counter(clip.label for clip, f in zip(corpus, folds, strict=True) if f == fold)
        assert inside == {"neutral": 10, "anger": 5, "worry": 2}


def test_groups_stay_together() -> None:
    corpus = clips({"neutral": 60, "anger": 60}, group_size=4)
    folds = split(corpus, 5, seed=0)
    of_group: dict[str, set[int]] = {}
    for clip, fold in zip(corpus, folds, strict=True):
        of_group.setdefault(clip.group, set()).add(fold)
    assert all(len(found) == 1 for found in of_group.values())
    assert set(folds) == set(range(5))


def test_a_class_smaller_than_the_folds_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"folds\.count: found 5, but class 'worry' has 4 labelled clips"):
        split(clips({"neutral": 50, "worry": 4}), 5, seed=0)
    with pytest.raises(PipelineError, match="has 3 labelled groups"):
        split(clips({"neutral": 24, "worry": 24}, group_size=8), 5, seed=0)
