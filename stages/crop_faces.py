"""Stage crop_faces: the main face of every faces.stride-th frame, aligned, with its confidence, in data/faces/."""

from pathlib import Path

from stages.engine.errors import run_stage
from stages.engine.params import load
from stages.engine.per_clip import write_media_store
from stages.media.face_crops import faces_decoder


def main() -> None:
    p = load()
    write_media_store("crop_faces", Path("data/faces"), "images", faces_decoder, p,
                      {"detector": p.faces.detector, "size": p.faces.size})


if __name__ == "__main__":
    run_stage(main)
