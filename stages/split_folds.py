"""Stage split_folds: seeded stratified folds of the labelled clips in data/folds.csv; groups never straddle folds."""

from collections import Counter

from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import write_rows
from stages.engine.manifest import Clip, read_manifest
from stages.engine.params import load_fusion


def split(clips: list[Clip], count: int, seed: int) -> list[int]:
    """The fold 0..count - 1 of each labelled clip. Stratified by label; by group too where clips have one.

    Raises PipelineError where a class has fewer clips (or groups) than there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels = [clip.label for clip in clips]
    grouped = any(clip.group for clip in clips)
    groups = [clip.group or clip.clip_id for clip in clips]
    for label in sorted(set(labels)):
        parts = {group for group, own in zip(groups, labels, strict=True) if own == label}
        if len(parts) < count:
            what = "groups" if grouped else "clips"
            raise PipelineError(f"folds.count: found {count}, but class {label!r} has {len(parts)} labelled {what}; "
                                f"expected at most {len(parts)} folds, or leave the class out of corpus.labels")
    splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(count, shuffle=True, random_state=seed)
    folds = [0] * len(clips)
    for fold, (_, validation) in enumerate(splitter.split(labels, labels, groups if grouped else None)):
        for i in validation:
            folds[i] = fold
    return folds


def main() -> None:
    p = load_fusion()
    clips = [clip for clip in read_manifest() if clip.split == "labelled"]
    missing = [label for label in p.corpus.labels if label not in Counter(clip.label for clip in clips)]
    if missing:
        raise PipelineError(f"data/manifest.csv: no labelled clip of class {', '.join(missing)}; "
                            f"expected some of every one of corpus.labels")
    folds = split(clips, p.folds.count, p.folds.seed)
    write_rows("data/folds.csv", ["clip_id", "fold"], [(c.clip_id, f) for c, f in zip(clips, folds, strict=True)])


if __name__ == "__main__":
    run_stage(main)
