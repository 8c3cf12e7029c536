"""The features of one extractor as MERTools keeps them: a .npy per clip.

    mer export-features hubert OUT              # (C,) float32: the mean over time, as in MERTools' -UTT folders
    mer export-features hubert OUT --frames     # (T, C): every frame, as in -FRA; needs keep_frames: true

A clip without features gets zeros, (C,) or (1, C), as MERTools writes where it finds nothing; mer import-features takes
such a clip for absent. EmoVCLIP's features, one set per fold, go to OUT/fold-0 and so on. OUT is a new or empty folder;
it is written whole or not at all.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stages.engine.errors import PipelineError, run_stage
from stages.engine.store import Store


def export_features(name: str, out: Path, frames: bool) -> tuple[int, int]:
    """Write OUT; (clips, those without features). Raises PipelineError for an unknown name and an OUT that holds
    files."""
    folder = Path("features") / name
    if not folder.is_dir():
        there = sorted(path.name for path in Path("features").glob("*/"))
        raise PipelineError(f"{folder}: not found; expected one of {', '.join(there) or 'those that dvc repro makes'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(f"{out}: is not an empty folder; expected the name of a new one")
    store = Store(folder)
    folds, dimension = int(store.attrs["folds"]), int(store.attrs["dimension"])
    if frames and folds > 1:
        raise PipelineError(f"--frames: {folder} has {folds} sets of features, one per fold, and no frames of them")
    out.parent.mkdir(parents=True, exist_ok=True)
    mean = store.mean
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        made = Path(temporary, "made")
        parts = [made] if folds == 1 else [made / f"fold-{fold}" for fold in range(folds)]
        for part in parts:
            part.mkdir(parents=True)
        for row, clip_id in enumerate(tqdm(store.clip_ids, f"export {name}", unit="clip", mininterval=1)):
            if frames:
                np.save(made / f"{clip_id}.npy", store.read(clip_id) if store.present[row] else mean[row][None])
                continue
            for part, values in zip(parts, mean[row].reshape(folds, dimension), strict=True):
                np.save(part / f"{clip_id}.npy", values)
        if out.exists():
            out.rmdir()
        os.rename(made, out)
    return len(store), int((~store.present).sum())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mer export-features", allow_abbrev=False,
                                     description="Features of one extractor as .npy files, one per clip.")
    parser.add_argument("name", help="a row of extractors in params.yaml, or emovclip")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--frames", action="store_true", help="the sequence (T, C) in place of its mean (C,)")
    asked = parser.parse_args(arguments)
    clips, absent = export_features(asked.name, asked.out, asked.frames)
    print(f"export-features: {clips} clips of {asked.name} in {asked.out}"
          + (f"; {absent} without features hold zeros" if absent else ""))


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
