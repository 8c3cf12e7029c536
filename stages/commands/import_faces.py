"""Face crops that you have already, as MERTools keeps them, in place of those that the stage crop_faces would make.

    dvc repro corpus
    mer import-faces /data/mer2026-dataset/openface_face
    dvc repro

The folder has <clip>/<clip>.npy, or <clip>.npy: uint8 (frames, height, width, 3) in OpenCV's order of colours, of every
frame of the clip (MERTools, feature_extraction/visual/extract_openface.py and dataset.py). faces.stride, faces.size and
faces.quality of params.yaml are applied, the other faces.* have no say. data/faces is then recorded as what crop_faces
made (dvc commit), so dvc repro keeps it until the corpus or faces.* change: then run this again.
"""

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from stages.corpora.folders import NOTHING, what_is
from stages.corpora.layout import shown
from stages.engine.devices import pick_workers
from stages.engine.errors import PipelineError, Skip, one_line, run_stage
from stages.engine.manifest import read_manifest
from stages.engine.params import load
from stages.engine.per_clip import PerClip
from stages.engine.store import Row
from stages.engine.work import Input, Target
from stages.media.frames import encode_jpeg

STAGE, OUT = "crop_faces", Path("data/faces")


def crops_row(clip_id: str, path: str, stride: int, size: int, quality: int) -> Row:
    """The clip's crops: JPEG, with their indices and, since none is known, confidence 1.

    Skip: there is no file, it is no array of images, or none of its frames holds anything.
    """
    if not path:
        raise Skip("no file of face crops")
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Skip(f"the file of face crops is no .npy array ({one_line(error)})") from None
    if frames.size == 0:
        raise Skip("the file of face crops is empty: no face was found")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise Skip(f"the file of face crops holds {frames.dtype} {frames.shape}, expected uint8 (frames, height, "
                   f"width, 3)")
    chosen = [i for i in range(0, len(frames), stride) if frames[i].any()]  # OpenFace leaves what it did not find black
    if not chosen:
        raise Skip(f"no face in {len(range(0, len(frames), stride))} frames of the file of face crops")
    images = [encode_jpeg(_resized(cv2.cvtColor(frames[i], cv2.COLOR_BGR2RGB), size), quality) for i in chosen]
    return Row(clip_id, values=images, items={"frame": chosen, "confidence": [1.0] * len(chosen)})


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] == (size, size):
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if len(image) > size else cv2.INTER_LINEAR)


def crop_file(folder: Path, clip_id: str) -> Path | None:
    """The clip's file in either layout. Raises PipelineError for one that is none, a pipe say."""
    for path in (folder / clip_id / f"{clip_id}.npy", folder / f"{clip_id}.npy"):
        kind = what_is(path)
        if not kind:
            return path
        if kind != NOTHING and "can't be reached" not in kind:
            raise PipelineError(f"{path}: a {kind}, expected a file")
    return None


def _input(folder: Path, clip_id: str) -> Input:
    path = crop_file(folder, clip_id)
    if path is None:
        return Input(clip_id, "", b"")
    state = path.stat()  # the arrays of a corpus are hundreds of gigabytes: too much to read twice
    content = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    return Input(clip_id, str(path), hashlib.blake2b(content.encode(errors="surrogateescape"), digest_size=16).digest())


def import_faces(folder: Path) -> None:
    """Write data/faces. Raises PipelineError as write_store, and for a folder with no clip's crops."""
    from stages.engine.extraction import write_store

    p = load()
    if not folder.is_dir():
        raise PipelineError(f"{folder}: no such folder; expected <clip>/<clip>.npy there")
    clips = [clip.clip_id for clip in read_manifest()]
    inputs = [_input(folder, clip_id) for clip_id in clips]
    if not any(clip.item for clip in inputs):
        there = shown(sorted(path.name for path in folder.iterdir()))
        raise PipelineError(f"{folder}: has crops of none of the {len(clips)} clips in data/manifest.csv; expected "
                            f"{clips[0]}/{clips[0]}.npy and so on, found {there or 'nothing'}")
    options = p.faces.stride, p.faces.size, p.faces.quality
    fingerprint = hashlib.sha256(f"import-faces 1 {options}".encode()).hexdigest()[:32]
    target = Target(STAGE, OUT, "images", {"detector": "imported", "size": p.faces.size}, fingerprint)
    function = partial(crops_row, stride=p.faces.stride, size=p.faces.size, quality=p.faces.quality)
    work = PerClip(function, pick_workers(p.runtime), p.runtime.clip_timeout_seconds)
    write_store(target, inputs, work, p, ["cpu"])


def record() -> None:
    """Tell DVC that crop_faces is up to date. Raises PipelineError where it can't be told."""
    done = subprocess.run([sys.executable, "-m", "dvc", "commit", "--quiet", "--force", STAGE], text=True,
                          capture_output=True)
    if done.returncode:
        raise PipelineError(f"dvc commit --force {STAGE}: failed: {' '.join(done.stderr.split())[-300:]}")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("mer import-faces", allow_abbrev=False,
                                     description="Face crops as MERTools keeps them into data/faces.")
    parser.add_argument("folder", type=Path, help="openface_face, with <clip>/<clip>.npy")
    asked = parser.parse_args(arguments)
    import_faces(asked.folder)
    record()
    print(f"import-faces: {OUT} holds the crops of {asked.folder}, recorded as the stage {STAGE}'s\nNow: dvc repro")


if __name__ == "__main__":
    run_stage(main, sys.argv[1:])
