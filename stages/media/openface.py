"""Face crops by OpenFace's FeatureExtraction binary, the paper's detector.

FeatureExtraction exits 0 on many failures and writes nothing, so its CSV and the number of aligned
images decide. Its numeric libraries are held to one thread: clips run in parallel.
"""

import csv
import os
import shutil
import signal
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import cv2

from stages.engine.errors import Died, PipelineError, Skip
from stages.media.frames import encode_jpeg

ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
COLUMNS = ("frame", "face_id", "confidence", "success")
NAME = "clip"  # of the outputs: a clip's own name may hold dots, which OpenFace cuts off


def crop_clip(
    path: str | Path, stride: int, size: int, min_confidence: float, quality: int, binary: str | None, time_limit: float
) -> tuple[list[bytes], list[int], list[float], str]:
    """The main face of every stride-th frame: (JPEG crops size x size, frame indices from 0, confidences, a note).

    time_limit in seconds; keep it below that of the worker that calls, or the binary goes on running after it.
    Skip: FeatureExtraction fails, hangs, or finds no face. PipelineError: there is no such binary.
    """
    executable = find_binary(binary)
    with tempfile.TemporaryDirectory(prefix="openface-") as folder:
        run(executable, Path(path), Path(folder), size, time_limit)
        frames, rows = main_face(Path(folder) / f"{NAME}.csv")
        crops, indices, confidences, lost = [], [], [], 0
        for frame, face_id, confidence in rows:
            if (frame - 1) % stride or confidence < min_confidence:
                continue
            image = cv2.imread(str(Path(folder) / f"{NAME}_aligned" / f"frame_det_{face_id:02d}_{frame:06d}.png"))
            if image is None:
                lost += 1
                continue
            crops.append(encode_jpeg(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), quality))
            indices.append(frame - 1)
            confidences.append(confidence)
    if not crops:
        missing = f"; {lost} aligned images are missing" if lost else ""
        raise Skip(f"no face found in {len(range(0, frames, stride))} frames{missing}")
    return crops, indices, confidences, f"damaged: {lost} aligned images are missing" if lost else ""


def find_binary(binary: str | None) -> str:
    """The absolute path of FeatureExtraction. PipelineError if it is not there or can't be run."""
    expected = "expected the path of OpenFace's FeatureExtraction executable"
    if binary is None:
        raise PipelineError(f"faces.openface_binary: found null, {expected}")
    executable = shutil.which(binary)
    if executable is None:
        state = "is not executable" if Path(binary).exists() else "does not exist"
        raise PipelineError(f"faces.openface_binary: {binary} {state}, {expected}")
    return os.path.abspath(executable)


def run(executable: str, path: Path, folder: Path, size: int, time_limit: float) -> None:
    """Run FeatureExtraction on one clip; its outputs lie in folder. Skip if it fails or takes too long."""
    command = [executable, "-f", str(path.absolute()), "-out_dir", str(folder), "-of", NAME]
    command += ["-simalign", "-simsize", str(size), "-format_aligned", "png", "-nomask"]
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that a hang is ended with all its children
        )
    except OSError as error:
        raise PipelineError(f"faces.openface_binary: {executable} can't be run: {error.strerror}") from None
    try:
        code = process.wait(time_limit)
    except subprocess.TimeoutExpired:
        limit = f"{time_limit:g} s (runtime.clip_timeout_seconds)"
        raise Died(f"OpenFace was stopped after {limit} without a result") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        raise Died(f"OpenFace crashed ({signal.Signals(-code).name})")
    if code:
        raise Skip(f"OpenFace failed with exit code {code}")


def main_face(path: Path) -> tuple[int, list[tuple[int, int, float]]]:
    """Read OpenFace's CSV: (number of frames, (frame from 1, face_id, confidence) where the main face was found).

    face_id is OpenFace's own track. With several, the main one has the most size x confidence over
    the clip; size is the extent of its landmarks where the CSV has them (-2Dfp), else confidence alone counts.
    """
    if not path.is_file():
        raise Skip("OpenFace wrote no result")
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(line.replace(" ", "") for line in lines)  # OpenFace writes "frame, face_id, ..."
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
        if missing:
            raise Skip(f"OpenFace wrote a CSV without {', '.join(missing)}")
        frames = 0
        weights: dict[int, float] = defaultdict(float)
        found: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
        try:
            for row in reader:
                frame, face_id = int(row["frame"]), int(row["face_id"])
                frames = max(frames, frame)
                if int(row["success"]) == 1:
                    confidence = float(row["confidence"])
                    weights[face_id] += confidence * face_size(row)
                    found[face_id].append((frame, face_id, confidence))
        except (TypeError, ValueError):
            raise Skip(f"OpenFace wrote a damaged CSV: line {reader.line_num}") from None
    if not found:
        raise Skip(f"no face found in {frames} frames" if frames else "OpenFace wrote an empty CSV")
    return frames, sorted(found[max(sorted(weights), key=weights.__getitem__)])


def face_size(row: dict[str, str]) -> float:
    """Side in pixels of the square of the landmarks' extent, or 1 in a CSV without landmarks."""
    if "x_0" not in row:
        return 1.0
    sides = [[float(row[f"{axis}_{point}"]) for point in range(68)] for axis in "xy"]
    return float(((max(sides[0]) - min(sides[0])) * (max(sides[1]) - min(sides[1]))) ** 0.5)
