"""Features over time, cut into a fixed number of equal parts: what fusions that read frames are fed."""

import numpy as np

from stages.engine.store import Store


def segment_means(frames: np.ndarray, segments: int, groups: int = 1) -> np.ndarray:
    """Means of equal parts of a clip's time, float32 (groups * segments * C,): group after group, in each part after
    part.

    frames: (T, groups * C), T at least 1. With fewer frames than parts a frame stands for several.
    """
    starts = np.arange(segments) * len(frames) // segments
    if len(frames) < segments:
        means = frames[starts].astype(np.float64)
    else:  # sums in float64, as pooling takes them
        sums = np.add.reduceat(frames.astype(np.float64), starts, axis=0)
        means = sums / np.diff(starts, append=len(frames))[:, None]
    return means.reshape(segments, groups, -1).swapaxes(0, 1).ravel().astype(np.float32)


def stored_segments(store: Store, segments: int, groups: int) -> np.ndarray:
    """The segment_means of every clip of a feature store that keeps frames: (N, groups * segments * C) float32; zeros
    where absent."""
    found = np.zeros((len(store), groups * segments * int(store.attrs["dimension"])), np.float32)
    for row, frames in enumerate(store.frames()):
        if frames is not None:
            found[row] = segment_means(frames, segments, groups)
    return found
