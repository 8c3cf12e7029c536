"""Stage slice_frames: uniformly sampled JPEG frames of every clip for EmoVCLIP, in data/frames/."""

from functools import partial
from pathlib import Path

from stages.engine.errors import run_stage
from stages.engine.params import load
from stages.engine.per_clip import write_media_store
from stages.engine.store import Row
from stages.media.frames import sample_frames


def frames_row(clip_id: str, path: str, per_clip: int | None, short_side: int, quality: int) -> Row:
    """JPEG frames of one clip and their indices. Raises Skip where there is no usable video stream."""
    images, indices, note = sample_frames(path, per_clip, short_side, quality)
    return Row(clip_id, values=images, reason=note, items={"frame": indices})


def main() -> None:
    p = load()
    function = partial(frames_row, **p.frames.model_dump())
    write_media_store("slice_frames", Path("data/frames"), "images", function, p, {"short_side": p.frames.short_side})


if __name__ == "__main__":
    run_stage(main)
