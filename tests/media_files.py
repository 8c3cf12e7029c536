"""A small whole clip for tests that need any clip at all."""

from pathlib import Path

import numpy as np

from stages.corpus.demo.video import write_clip


def write_small_clip(path: Path, seconds: float = 1.0, rate: int = 16000) -> None:
    """Grey frames that brighten, and a tone."""
    count = int(seconds * 25)
    frames = [np.full((48, 64, 3), 50 + i, np.uint8) for i in range(count)]
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate)) / rate)
    write_clip(path, frames, tone.astype(np.float32), rate)
