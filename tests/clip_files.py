"""Small clips, written with PyAV."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def write_clip(
    path: Path, seconds: float, picture: bool = True, sound: bool = True, brightness: int = 0, pitch: float = 0.2
) -> None:
    """Grey frames that grow brighter, 64 x 48 at 10 fps, and a tone of `pitch` radians per sample at 16 kHz."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=Fraction(10)) if picture else None
        audio: Any = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        if picture:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for i in range(int(10 * seconds)):
                image = np.full((48, 64, 3), 20 + brightness + 10 * i, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if sound:
            samples = (8000 * np.sin(np.arange(int(16_000 * seconds)) * pitch)).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
