"""How alike two sets of features of the same clips are: the cosine per clip, and its quantiles.

    mer compare-features features/hubert /theirs/chinese-hubert-large-UTT > cosines.csv

A and B are folders of .npy files, one per clip, (C,) or (T, C), or feature stores of this pipeline; sequences are
compared by their means over time. The rows clip,cosine go to the standard output, least alike first, the summary to the
standard error. A clip that only one of the two has features of (zeros are none) is counted, and not compared.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stages.commands.npy import feature_files, read_array
from stages.corpora.layout import shown
from stages.engine.errors import PipelineError, run_stage
from stages.engine.store import INDEX, Store

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)  # percent


def read_means(folder: Path) -> dict[str, np.ndarray]:
    """clip -> (C,) float64, of the clips that have features. Raises PipelineError for a folder of neither kind, and for
    a file that is no array of one or two axes."""
    if (folder / INDEX).exists():
        store = Store(folder)
        if store.kind != "features":
            raise PipelineError(f"{folder}: a store of {store.kind}, expected one of features")
        return {clip: mean.astype(float) for clip, mean, there in
                zip(store.clip_ids, store.mean, store.present, strict=True) if there}
    means = {}
    for clip, path in feature_files(folder).items():
        array = read_array(path).astype(float)
        if array.any():
            if array.ndim not in (1, 2):
                raise PipelineError(f"{path}: found shape {array.shape}, expected (C,) or (frames, C)")
            means[clip] = array.mean(axis=0) if array.ndim == 2 else array
    return means


def compare(a: Path, b: Path) -> list[tuple[str, float]]:
    """(clip, cosine) of the clips that both have, least alike first. Says on stderr what only one has.

    Raises PipelineError where there is no common clip, or where the dimensions differ.
    """
    left, right = read_means(a), read_means(b)
    for one, other, folder in ((left, right, a), (right, left, b)):
        if alone := sorted(one.keys() - other.keys()):
            print(f"compare-features: {len(alone)} clips have features in {folder} alone: {shown(alone)}",
                  file=sys.stderr)
    common = sorted(left.keys() & right.keys())
    if not common:
        raise PipelineError(f"{a}, {b}: no clip has features in both; expected files of the same names")
    cosines = []
    for clip in common:
        x, y = left[clip], right[clip]
        if x.shape != y.shape:
            raise PipelineError(f"{clip}: {len(x)} features in {a}, {len(y)} in {b}; expected the same extractor's")
        cosines.append((clip, float(x @ y / np.sqrt((x @ x) * (y @ y)))))
    return sorted(cosines, key=lambda row: (row[1], row[0]))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mer compare-features", allow_abbrev=False,
                                     description="Cosine per clip of two sets of features, and its quantiles.")
    for name in "ab":
        parser.add_argument(name, type=Path, metavar=name.upper(), help="a folder of .npy files, or features/<name>")
    asked = parser.parse_args(arguments)
    cosines = compare(asked.a, asked.b)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["clip", "cosine"])
    writer.writerows((clip, f"{cosine:.6f}") for clip, cosine in cosines)
    sys.stdout.flush()  # before the summary, where both go to one terminal
    values = np.percentile([cosine for _, cosine in cosines], QUANTILES)
    quantiles = ", ".join(f"{percent} %: {value:.6f}" for percent, value in zip(QUANTILES, values, strict=True))
    print(f"compare-features: cosine of {len(cosines)} clips, quantiles: {quantiles}", file=sys.stderr)


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
