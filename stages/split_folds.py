"""Stage split_folds: seeded stratified folds of the labelled clips in data/folds.csv; groups never straddle folds."""

import sys
from collections import Counter, defaultdict
from typing import Literal

from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import write_rows
from stages.engine.manifest import Clip, read_manifest
from stages.engine.params import load_fusion


def split(clips: list[Clip], count: int | Literal["groups"], seed: int) -> list[int]:
    """The fold of each labelled clip, 0..count - 1, or one per group (stages/fusion/folds.py).

    Raises PipelineError where a class has fewer clips than there are folds, or where there are fewer groups.
    """
    from stages.fusion import folds

    if count == "groups":
        if alone := [clip.clip_id for clip in clips if not clip.group]:
            raise PipelineError(f"folds.count: found groups, but {len(alone)} of {len(clips)} labelled clips have none "
                                f"({alone[0]}); expected a number, or a group for each in the corpus's table")
        count = len({clip.group for clip in clips})
        if count < 2:
            raise PipelineError(f"folds.count: found groups, but all labelled clips are of the group "
                                f"{clips[0].group!r}; expected two groups or more, or a number")
    labels = [clip.label for clip in clips]
    groups = [clip.group or clip.clip_id for clip in clips]
    if not any(clip.group for clip in clips):
        groups = [""] * len(clips)
    label, least = min(sorted(Counter(labels).items()), key=lambda item: item[1])
    if not any(groups) and least < count:
        raise PipelineError(f"folds.count: found {count}, but class {label!r} has {least} labelled clips; expected "
                            f"at most {least} folds, or leave the class out of corpus.labels")
    distinct = len(set(groups))
    if any(groups) and distinct < count:
        raise PipelineError(f"folds.count: found {count}, but the labelled clips are of {distinct} groups; expected at "
                            f"most {distinct} folds")
    return folds.split(labels, groups, count, seed).tolist()


def remarks(clips: list[Clip], folds: list[int]) -> list[str]:
    """What the folds cannot do: classes that a fold's training part lacks, and how many validation parts lack some."""
    count = max(folds) + 1
    where: dict[str, set[int]] = defaultdict(set)
    for clip, fold in zip(clips, folds, strict=True):
        where[clip.label].add(fold)
    found = [f"all clips of class {label!r} are in one fold, which is trained without it"
             for label, own in sorted(where.items()) if len(own) == 1]
    lacking = {fold for own in where.values() for fold in range(count) if fold not in own}
    return found + ([f"{len(lacking)} of {count} folds validate without a clip of some class"] if lacking else [])


def main() -> None:
    p = load_fusion()
    clips = [clip for clip in read_manifest() if clip.split == "labelled"]
    missing = [label for label in p.corpus.labels if label not in Counter(clip.label for clip in clips)]
    if missing:
        raise PipelineError(f"data/manifest.csv: no labelled clip of class {', '.join(missing)}; "
                            f"expected some of every one of corpus.labels")
    folds = split(clips, p.folds.count, p.folds.seed)
    for remark in remarks(clips, folds):
        print(f"warning: split_folds: {remark}", file=sys.stderr)
    write_rows("data/folds.csv", ["clip_id", "fold"], [(c.clip_id, f) for c, f in zip(clips, folds, strict=True)])


if __name__ == "__main__":
    run_stage(main)
