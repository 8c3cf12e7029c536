"""Clip thumbnails for the report: the middle stored frame, small, as a data: URI."""

import base64
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from stages.engine.store import Store

LONG_SIDE = 96             # pixels
QUALITY = 70               # JPEG
TOTAL_BYTES = 2_500_000    # all thumbnails together as base64: keeps the page below 5 MB whatever the frames show


def thumbnails(clip_ids: Iterable[str], folder: Path) -> dict[str, str]:
    """Data URI per clip, in the order asked for, until TOTAL_BYTES are spent.

    folder: a store of JPEG frames (data/frames); where the run has none (imported features), or the clip has no
    frame that can be decoded, there is no thumbnail.
    """
    if not folder.exists():
        return {}
    store, found, spent = Store(folder), {}, 0
    for clip_id in dict.fromkeys(clip_ids):
        images = store.read(clip_id) if clip_id in store else []
        uri = thumbnail(images[len(images) // 2]) if images else None
        if uri is None:
            continue
        spent += len(uri)
        if spent > TOTAL_BYTES:
            break
        found[clip_id] = uri
    return found


def thumbnail(jpeg: bytes) -> str | None:
    """A data URI of the image at LONG_SIDE pixels, or None for bytes that are no image."""
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        return None
    height, width = image.shape[:2]
    scale = LONG_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
