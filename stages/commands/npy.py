"""Feature files as MERTools writes them: one .npy per clip, (C,) pooled (-UTT) or (T, C) per frame (-FRA).

An empty or all-zero array is what MERTools writes where it found nothing, no face say: such a clip counts as absent.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stages.corpora.folders import SHOWN, escaped, what_is
from stages.encoders.pooling import pooled_row
from stages.engine.errors import PipelineError, one_line
from stages.engine.store import Row, write_index, write_shard

SAMPLE = 101  # files whose majority says what shape the others must have
SHARD_SIZE = 1024  # clips
NOTHING = "the file holds only zeros, as extractors write where they find nothing"


@dataclass(frozen=True)
class Layout:
    """What all files of a modality have in common."""

    axes: int  # 1: (C,); 2: (T, C)
    dimension: int  # C

    def __str__(self) -> str:
        return f"({self.dimension},)" if self.axes == 1 else f"(frames, {self.dimension})"


def feature_files(folder: Path) -> dict[str, Path]:
    """Clip name -> its file, sorted by name. Raises PipelineError for a missing folder or one without .npy files."""
    if not folder.is_dir():
        raise PipelineError(f"{folder}: no such folder; expected one .npy per clip there")
    files = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    found: dict[str, Path] = {}
    for path in files:
        if path.suffix.lower() == ".npy":
            if kind := what_is(path):  # a pipe would be waited for without an end
                raise PipelineError(f"{escaped(path)}: a {kind}, expected a file")
            if path.stem in found:
                raise PipelineError(f"{path}: {found[path.stem].name} is there too; expected one file a clip")
            found[path.stem] = path
    if not found:
        others = sorted({path.suffix or path.name for path in files})
        found_instead = f" (found {', '.join(others[:SHOWN])})" if others else ""
        raise PipelineError(f"{folder}: no .npy files{found_instead}; expected "
                            f"one per clip, named after it, as numpy.save writes them")
    return found


def read_array(path: Path) -> np.ndarray:
    """One file's array, of any number type; nothing is ever unpickled.

    Raises PipelineError for a file that is no array of finite numbers.
    """
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PipelineError(f"{path}: not a .npy array ({one_line(error)})") from None
    if array.dtype.kind not in "fiu":
        raise PipelineError(f"{path}: holds {array.dtype}, expected numbers")
    if not np.isfinite(array).all():
        raise PipelineError(f"{path}: holds NaN or infinite values; extract it anew, or remove it: the clip then "
                            f"counts as absent")
    return array


def common_layout(paths: Sequence[Path]) -> Layout:
    """The layout that most of the first files have. Raises PipelineError where none is (C,) or (T, C)."""
    arrays = [read_array(path) for path in paths[:SAMPLE]]
    layouts = Counter(Layout(array.ndim, array.shape[-1]) for array in arrays if array.ndim in (1, 2) and array.any())
    if not layouts:
        raise PipelineError(f"{paths[0].parent}: found no array of shape (C,) or (frames, C) with more than zeros in "
                            f"its first {len(arrays)} files, {paths[0].name} the first")
    return layouts.most_common(1)[0][0]


def read_row(clip_id: str, path: Path | None, layout: Layout, keep_frames: bool = False) -> Row:
    """The clip's row: mean over time, and variance where there are frames; keep_frames: those too, as float32.

    Raises PipelineError for another layout.
    """
    if path is None:
        return Row(clip_id, reason="no feature file")
    array = read_array(path)
    if not array.any():
        return Row(clip_id, reason=NOTHING)
    if array.ndim != layout.axes or array.shape[-1] != layout.dimension:
        raise PipelineError(f"{path}: found shape {array.shape}, expected {layout} as in most files of the folder")
    with np.errstate(over="ignore"):
        row = pooled_row(clip_id, array if layout.axes == 2 else array[None], False, layout.axes == 2)
        row = replace(row, values=array.astype(np.float32)) if keep_frames else row
    if not all(np.isfinite(part).all() for part in (row.mean, row.var, row.values) if part is not None):
        raise PipelineError(f"{path}: holds numbers too large for float32")
    return row


def write_features(
    out: Path, name: str, clip_ids: Sequence[str], files: Mapping[str, Path], keep_frames: bool = False
) -> list[str]:
    """Write the feature store of one modality over these clips; returns the clips that are absent from it."""
    layout = common_layout([files[clip_id] for clip_id in clip_ids if clip_id in files])
    attributes = {"extractor": name, "encoder": "npy", "checkpoint": "", "revision": "", "dtype": "float32",
                  "dimension": layout.dimension, "variance": layout.axes == 2}
    absent, names = [], []
    with tqdm(total=len(clip_ids), desc=f"import {name}", unit="clip", mininterval=1) as bar:
        for number, rows in enumerate(_shards(clip_ids, files, layout, keep_frames and layout.axes == 2)):
            content = hashlib.blake2b(b"".join(row.digest for row in rows), digest_size=16).hexdigest()
            names.append(f"shard-{number:05d}.h5")
            write_shard(out / names[-1], "features", rows, {**attributes, "fingerprint": content})
            absent += [row.clip_id for row in rows if not row.present]
            bar.update(len(rows))
    write_index(out, names)
    return absent


def _shards(
    clip_ids: Sequence[str], files: Mapping[str, Path], layout: Layout, keep_frames: bool
) -> Iterator[list[Row]]:
    for start in range(0, len(clip_ids), SHARD_SIZE):
        chunk = clip_ids[start : start + SHARD_SIZE]
        yield [read_row(clip_id, files.get(clip_id), layout, keep_frames) for clip_id in chunk]
