"""Stage slice_frames: uniformly sampled JPEG frames of every clip for EmoVCLIP, in data/frames/."""

from pathlib import Path

from stages.engine.errors import run_stage
from stages.engine.params import load
from stages.engine.per_clip import write_media_store
from stages.media.frames import frames_decoder


def main() -> None:
    p = load()
    write_media_store("slice_frames", Path("data/frames"), "images", frames_decoder, p,
                      {"short_side": p.frames.short_side})


if __name__ == "__main__":
    run_stage(main)
