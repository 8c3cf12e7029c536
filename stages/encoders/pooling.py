"""From a clip's features over time to the statistics that the fusion takes [paper 3.3: UTT-level pooling]."""

from typing import Any

import numpy as np

from stages.engine.store import Row


def pooled_row(clip_id: str, features: np.ndarray, keep_frames: bool, variance: bool) -> Row:
    """The row of (T, C) features: mean over time, and with `variance` the population variance, float32 (C,) each.

    keep_frames also stores the sequence, in its own dtype. Sums are taken in float64: long clips lose nothing. A clip
    whose features are not finite is absent, and its row says so.
    """
    if not np.isfinite(features).all():
        return Row(clip_id, reason="the encoder returned non-finite features; try dtype: float32")
    wide = features.astype(np.float64)
    return Row(
        clip_id,
        values=features if keep_frames else None,
        mean=wide.mean(axis=0).astype(np.float32),
        var=wide.var(axis=0).astype(np.float32) if variance else None,
    )


def encoded_row(encoder: Any, clip_id: str, features: np.ndarray, keep_frames: bool) -> Row:
    """The row of what the encoder gave for a clip: (T, C), or (T, folds * C) of one that is trained per fold."""
    return pooled_row(clip_id, features, keep_frames, getattr(encoder, "variance", True))
