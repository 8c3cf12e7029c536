"""Folds: stratified, seeded, and a group is never split."""

import warnings
from collections import Counter

import pytest

from stages.engine.errors import PipelineError
from stages.engine.manifest import Clip
from stages.split_folds import remarks, split


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
    with pytest.raises(PipelineError, match="found 5, but the labelled clips are of 4 groups; expected at most 4"):
        split(clips({"neutral": 24, "worry": 24}, group_size=12), 5, seed=0)


def test_one_fold_per_group_without_counting_them() -> None:
    corpus = grouped({"iemocap": {"joy": 30, "fear": 20}, "meld": {"joy": 4}, "emodb": {"joy": 9, "fear": 9}})
    folds = split(corpus, "groups", seed=0)
    assert folds == split(corpus, 3, seed=0)
    assert len({(clip.group, fold) for clip, fold in zip(corpus, folds, strict=True)}) == len(set(folds)) == 3
    assert remarks(corpus, folds) == ["1 of 3 folds validate without a clip of some class"]
    with pytest.raises(PipelineError, match=r"found groups, but 50 of 50 labelled clips have none \(c0\); expected a"):
        split(clips({"neutral": 25, "anger": 25}), "groups", seed=0)
    with pytest.raises(PipelineError, match="found groups, but all labelled clips are of the group 'meld'; expected t"):
        split(grouped({"meld": {"joy": 4, "fear": 3}}), "groups", seed=0)


def grouped(counts: dict[str, dict[str, int]]) -> list[Clip]:
    """Clips of each group as label -> how many."""
    return [Clip(f"{group}-{label}-{i}", "", "labelled", label, "", group, None, 0, "")
            for group, own in counts.items() for label, count in own.items() for i in range(count)]


# groups as label -> clips, folds, what is said of them
GROUPED: dict[str, tuple[dict[str, dict[str, int]], int, list[str]]] = {
    "one speaker out": ({f"s{i}": {"joy": 5, "fear": 3} for i in range(4)}, 4, []),
    "a speaker without a class": ({f"s{i}": {"joy": 5} | ({"fear": 3} if i else {}) for i in range(5)}, 5,
                                  ["1 of 5 folds validate without a clip of some class"]),
    "a class of one speaker": ({f"s{i}": {"joy": 5, "fear": 4} | ({"awe": 9} if i == 2 else {}) for i in range(5)}, 5,
                               ["all clips of class 'awe' are in one fold, which is trained without it",
                                "4 of 5 folds validate without a clip of some class"]),
    "speakers of one class each": ({f"s{i}": {"joy" if i % 2 else "fear": 6} for i in range(6)}, 3, []),
    "more speakers than folds": ({f"s{i}": {"joy": 3, "fear": 2, "awe": i % 2} for i in range(10)}, 5, []),
    "one speaker with almost everything": (
        {"s0": {"joy": 90, "fear": 90}, "s1": {"joy": 1}, "s2": {"fear": 1}, "s3": {"joy": 1}}, 3,
        ["2 of 3 folds validate without a clip of some class"]),
    "classes smaller than the folds": ({f"s{i}": {"joy" if i % 2 else "fear": 1} for i in range(6)}, 4,
                                       [" of 4 folds validate without"]),
    "fewer clips of each class than folds": (
        {f"s{i}": {"joy" if i % 2 else "fear": 1} for i in range(4)}, 3, [" of 3 folds validate without"]),
}


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("seed", [0, 1])
def test_groups_may_lack_classes(case: str, seed: int) -> None:
    counts, count, said = GROUPED[case]
    corpus = grouped(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folds = split(corpus, count, seed)
    assert folds == split(corpus, count, seed) and set(folds) == set(range(count))
    of_group = {(clip.group, fold) for clip, fold in zip(corpus, folds, strict=True)}
    assert len(of_group) == len(counts)
    found = remarks(corpus, folds)
    if said or case == "one speaker out":
        assert len(found) == len(said) and all(b in a for a, b in zip(found, said, strict=True))
