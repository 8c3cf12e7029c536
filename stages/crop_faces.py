"""Stage crop_faces: the main face of every faces.stride-th frame, aligned, with its confidence, in data/faces/."""

from functools import partial
from pathlib import Path

from stages.engine.errors import run_stage
from stages.engine.params import Faces, load
from stages.engine.per_clip import extract_media
from stages.engine.store import Row
from stages.media import centerface, openface


def faces_row(clip_id: str, path: str, faces: Faces, time_limit: float) -> Row:
    """JPEG crops of one clip, their frame indices and confidences. Raises Skip where no face is found.

    A face followed between two detections (faces.detect_every) has the lower of their confidences.
    """
    options = (faces.stride, faces.size, faces.min_confidence, faces.quality)
    if faces.detector == "openface":
        found = openface.crop_clip(path, *options, faces.openface_binary, time_limit)
    else:
        found = centerface.crop_clip(path, *options, faces.detect_every)
    crops, indices, confidences, note = found
    return Row(clip_id, values=crops, reason=note, items={"frame": indices, "confidence": confidences})


def main() -> None:
    p = load()
    if p.faces.detector == "openface":
        openface.find_binary(p.faces.openface_binary)  # before any clip: a wrong path is not the clips' fault
    # OpenFace is stopped before the worker that waits for it, so that it does not outlive it
    function = partial(faces_row, faces=p.faces, time_limit=0.9 * p.runtime.clip_timeout_seconds)
    extract_media("crop_faces", Path("data/faces"), "images", function, p,
                  {"detector": p.faces.detector, "size": p.faces.size})


if __name__ == "__main__":
    run_stage(main)
