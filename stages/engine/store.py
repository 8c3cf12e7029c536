"""The shard store: the only reader and writer of HDF5.

A store is a folder of shard-00000.h5, shard-00001.h5, ... with the clips in manifest order. A shard holds

    clip_id   (n,) bytes    present (n,) bool    reason (n,) bytes: why absent, or what is partial
    died      (n,) bool: absent since its decoder crashed or was stopped, which another try may mend
    digest    (n,) 16 bytes of BLAKE2b over the clip's content: what the stages downstream fingerprint
    values    flat data; offsets (n + 1,) int64 cut it by clip
              audio: int16 samples   text: UTF-8 bytes   features: (frames, C), only where frames are kept
              images: encoded bytes, cut by item_offsets; offsets then count images
    mean, var (n, folds * C) float32 over time, for features; folds is 1 but for an encoder that is trained per fold
    item_*    one value per image: item_frame (index in the clip), item_confidence

and, as attributes, the schema version, kind and what made it (extractor, checkpoint, revision, dtype,
dimension, fingerprint, device, versions of packages). index.json lists the shards with their fingerprints, so that a
missing or foreign one is found, and says what the store was made from, or why it is empty: nobody needs it.
Every dataset carries Fletcher-32 checksums, so a flipped byte is found on read. Nothing in a file depends on
time or order of writing: same content, same bytes.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from stages.engine.errors import PipelineError, one_line
from stages.engine.files import empty_folder, replacing, write_json

SCHEMA = 2
INDEX = "index.json"
KINDS = ("audio", "images", "text", "features")
CHUNK_BYTES = 1 << 18  # a clip's slice touches few chunks, and a chunk is large enough for a fast checksum


@dataclass(frozen=True)
class Row:
    """What is stored for one clip. Absent clips have neither values nor mean."""

    clip_id: str
    values: Any = None  # audio: int16 (n,); images: list[bytes]; text: str; features: (T, C) where kept
    mean: np.ndarray | None = None  # (C,) float32
    var: np.ndarray | None = None  # (C,) float32
    reason: str = ""
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)  # per image: frame, confidence
    died: bool = False  # absent since its decoder crashed or was stopped

    @property
    def present(self) -> bool:
        return self.values is not None or self.mean is not None

    @property
    def digest(self) -> bytes:
        content = hashlib.blake2b(digest_size=16)
        for part in _parts(self):
            content.update(len(part).to_bytes(8, "little") + part)
        return content.digest()


def _parts(row: Row) -> Iterable[bytes]:
    if isinstance(row.values, str):
        yield row.values.encode()
    elif isinstance(row.values, list):
        yield from row.values
    elif row.values is not None:
        yield np.ascontiguousarray(row.values).tobytes()
    for statistic in (row.mean, row.var):
        if statistic is not None:
            yield statistic.tobytes()


# ---------------------------------------------------------------- writing


def write_shard(path: Path, kind: str, rows: Sequence[Row], attributes: Mapping[str, Any]) -> None:
    """Write one shard, whole or not at all. Raises ValueError for rows that do not fit the kind, OSError as replacing.

    HDF5 makes the file in memory: on a full disk the library fails at closing, in ways that depend on its version.
    """
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
        file.attrs["schema"] = SCHEMA
        file.attrs["kind"] = _attribute(kind)
        for name in sorted(attributes):
            file.attrs[name] = _attribute(attributes[name])
        _write_rows(file, kind, rows)
        file.flush()
        content = file.id.get_file_image()
    with replacing(path, "wb") as target:
        target.write(content)


def write_index(folder: Path, names: Sequence[str], heads: "Sequence[Head] | None" = None, **origin: str) -> None:
    """Write the folder's index.json: the store's shards in order, and the digest of all its clips.

    heads: the shards' own, read if not given. origin: what the store was made from, as digests: `source`, its inputs,
    and `loaded`, local checkpoints.
    """
    heads = heads or [read_head(folder / name) for name in names]
    digest = _joined(digest for head in heads for digest in head.digests)
    shards = {name: head.attributes["fingerprint"] for name, head in zip(names, heads, strict=True)}
    write_json(folder / INDEX, {"digest": digest, **origin, "shards": shards})


def write_empty(folder: Path, reason: str) -> None:
    """A store without clips, which says why."""
    empty_folder(folder)
    write_json(folder / INDEX, {"digest": _joined([]), "empty": reason, "shards": {}})


def read_index(folder: Path) -> dict[str, Any]:
    """A store's index.json. Raises PipelineError where it is missing or damaged."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise PipelineError(f"{path}: can't be read ({one_line(error)}); {_rebuild(folder)}") from None
    if not isinstance(index, dict) or not isinstance(index.get("shards"), dict):
        raise PipelineError(f"{path}: lists no shards; {_rebuild(folder)}")
    return index


def _joined(digests: Iterable[bytes]) -> str:
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _attribute(value: Any) -> Any:
    """Text at a fixed length: HDF5 keeps it in the object's header, which has a checksum; its string heap has none."""
    if value is not None and not isinstance(value, str):
        return value
    text = (value or "").encode()
    return np.array(text, h5py.string_dtype("utf-8", len(text) or 1))


def _write_rows(file: h5py.File, kind: str, rows: Sequence[Row]) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}, expected one of {KINDS}")
    _put(file, "clip_id", np.array([row.clip_id.encode() for row in rows], dtype=np.bytes_))
    _put(file, "present", np.array([row.present for row in rows], dtype=bool))
    _put(file, "reason", np.array([row.reason.encode() for row in rows], dtype=np.bytes_))
    _put(file, "died", np.array([row.died for row in rows], dtype=bool))
    _put(file, "digest", np.frombuffer(b"".join(row.digest for row in rows), np.uint8).reshape(len(rows), 16))
    if kind == "features":
        _write_statistics(file, rows)
    if kind == "images":
        images = [image for row in rows for image in row.values or []]
        _put(file, "values", np.frombuffer(b"".join(images), np.uint8))
        _put(file, "item_offsets", _offsets(len(image) for image in images))
        _put(file, "offsets", _offsets(len(row.values or []) for row in rows))
        for name in sorted({name for row in rows for name in row.items}):
            _put(file, f"item_{name}", np.array([v for row in rows for v in row.items.get(name, [])], np.float32))
        return
    arrays = [_array(kind, row.values) for row in rows]
    kept = [array for array in arrays if array is not None]
    if kept or kind != "features":
        empty = np.zeros(0, np.uint8 if kind == "text" else np.int16)
        _put(file, "values", np.concatenate(kept) if kept else empty)
        _put(file, "offsets", _offsets(0 if array is None else len(array) for array in arrays))


def _write_statistics(file: h5py.File, rows: Sequence[Row]) -> None:
    dimension = int(file.attrs["dimension"]) * int(file.attrs.get("folds", 1))
    for name in ("mean", "var"):
        found = [getattr(row, name) for row in rows]
        if name == "var" and not file.attrs["variance"]:
            continue
        zeros = np.zeros(dimension, np.float32)
        _put(file, name, np.stack([zeros if value is None else value for value in found]))


def _array(kind: str, values: Any) -> np.ndarray | None:
    if values is None:
        return None
    if kind == "text":
        return np.frombuffer(values.encode(), np.uint8)
    if kind == "audio" and values.dtype != np.int16:
        raise ValueError(f"audio of dtype {values.dtype}, expected int16")
    return values


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype(np.int64)


def _put(file: h5py.File, name: str, data: np.ndarray) -> None:
    if data.dtype.kind == "S" and data.dtype.itemsize == 0:
        data = data.astype("S1")
    if data.size == 0:
        file.create_dataset(name, data=data)
        return
    per_row = data.dtype.itemsize * int(np.prod(data.shape[1:]))
    chunk = (min(len(data), max(1, CHUNK_BYTES // per_row)), *data.shape[1:])
    file.create_dataset(name, data=data, chunks=chunk, fletcher32=True)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Shard:
    path: Path
    attrs: dict[str, Any]
    columns: dict[str, np.ndarray]  # the small per-clip arrays


class Store:
    """A folder of shards, read-only. Raises PipelineError naming a shard that is missing, damaged or foreign."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        paths = sorted(self.folder.glob("shard-*.h5"))
        has_index = (self.folder / INDEX).exists()
        self.empty = read_index(self.folder).get("empty", "") if has_index and not paths else ""  # why it has no clips
        if not paths and not self.empty:
            raise PipelineError(f"{folder}: no shards found; {_rebuild(self.folder)}")
        self._shards = [_open(path) for path in paths]
        self.attrs, self.index = self._shards[0].attrs if paths else {}, read_index(self.folder)
        self._check()
        self.clip_ids = [c.decode() for shard in self._shards for c in shard.columns["clip_id"]]
        self.present = np.concatenate([np.zeros(0, bool), *(shard.columns["present"] for shard in self._shards)])
        self.reasons = [r.decode() for shard in self._shards for r in shard.columns["reason"]]
        self.digests = [d.tobytes() for shard in self._shards for d in shard.columns["digest"]]
        self._index = {
            clip_id.decode(): (shard, i)
            for shard in self._shards
            for i, clip_id in enumerate(shard.columns["clip_id"])
        }

    def _check(self) -> None:
        index = self.index["shards"]
        found = {shard.path.name: shard.attrs["fingerprint"] for shard in self._shards}
        for name in sorted(found.keys() | index.keys()):
            if found.get(name) != index.get(name):
                what = "missing" if name not in found else "not this store's: made from other inputs, params or code"
                raise PipelineError(f"{self.folder / name}: {what}; {_rebuild(self.folder)}")

    def __len__(self) -> int:
        return len(self.clip_ids)

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self._index

    @property
    def kind(self) -> str:
        return str(self.attrs["kind"])

    @property
    def digest(self) -> str:
        """Hex digest of every clip's content, in order."""
        return _joined(self.digests)

    @property
    def dimension(self) -> int:
        """Numbers per clip in mean and var: folds * C."""
        return int(self.attrs["dimension"]) * int(self.attrs.get("folds", 1))

    @property
    def mean(self) -> np.ndarray:
        """(N, folds * C) float32; zeros for absent clips."""
        return self._stack("mean")

    @property
    def var(self) -> np.ndarray | None:
        """(N, C) float32 population variance over time, or None where the store has none."""
        return self._stack("var") if self.attrs.get("variance") else None

    def read(self, clip_id: str) -> Any:
        """The clip's values: int16 (n,), list of encoded images, str, or (T, C). KeyError for an unknown clip."""
        shard, i = self._index[clip_id]
        with _opened(shard.path) as file:
            if "values" not in file:
                raise PipelineError(f"{self.folder}: frames were not kept; set keep_frames: true for this extractor")
            start, end = file["offsets"][i : i + 2]
            if self.kind != "images":
                values = file["values"][start:end]
                return values.tobytes().decode() if self.kind == "text" else values
            cuts = file["item_offsets"][start : end + 1]
            if len(cuts) < 2:
                return []
            data = file["values"][cuts[0] : cuts[-1]].tobytes()
            return [data[a - cuts[0] : b - cuts[0]] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]

    @property
    def keeps_frames(self) -> bool:
        """Whether features over time are there, besides their mean; a store without any present clip has none."""
        for shard in self._shards:
            if shard.columns["present"].any():
                with _opened(shard.path) as file:
                    return "values" in file
        return False

    def frames(self) -> Iterator[np.ndarray | None]:
        """Every clip's features over time (T, C), in order, None where absent; each shard is opened once."""
        for shard in self._shards:
            present = shard.columns["present"]
            with _opened(shard.path) as file:
                offsets = file["offsets"][:] if present.any() else np.zeros(len(present) + 1, np.int64)
                for found, start, end in zip(present, offsets[:-1], offsets[1:], strict=True):
                    yield file["values"][start:end] if found else None

    def read_items(self, clip_id: str, name: str) -> np.ndarray:
        """One float32 per image of the clip: `frame` (index in the clip) or `confidence` of the detection."""
        shard, i = self._index[clip_id]
        with _opened(shard.path) as file:
            start, end = file["offsets"][i : i + 2]
            return file[f"item_{name}"][start:end]

    def statistics(
        self, names: Sequence[str], wanted: np.ndarray | None = None
    ) -> Iterator[tuple[slice, list[np.ndarray]]]:
        """Shard by shard: which clips it holds, and their `mean` or `var` by these names, (n, folds * C) float32.

        wanted: (N,) bool; only shards that hold one of these clips.
        """
        start = 0
        for shard in self._shards:
            part = slice(start, start + len(shard.columns["clip_id"]))
            start = part.stop
            if wanted is None or wanted[part].any():
                with _opened(shard.path) as file:
                    values = [file[name][:] for name in names]
                yield part, values

    def _stack(self, name: str) -> np.ndarray:
        stacked = np.empty((len(self), self.dimension), np.float32)
        for part, [values] in self.statistics([name]):
            stacked[part] = values
        return stacked


class HeadRow(NamedTuple):
    clip_id: str
    present: bool
    reason: str
    died: bool


@dataclass(frozen=True)
class Head:
    """What one shard says of itself without its values."""

    attributes: Mapping[str, Any]
    rows: list[HeadRow]
    digests: list[bytes]


def read_head(path: Path, fingerprint: str | None = None) -> Head:
    """The head of one shard. Raises PipelineError if that is damaged, the file cut off, or not of the fingerprint."""
    shard = _open(path)
    found = shard.attrs.get("fingerprint")
    if fingerprint not in (None, found):
        raise PipelineError(f"{path}: found fingerprint {found}, expected {fingerprint}")
    columns = (shard.columns[name] for name in ("clip_id", "present", "reason", "died"))
    rows = [
        HeadRow(clip_id.decode(), bool(present), reason.decode(), bool(died))
        for clip_id, present, reason, died in zip(*columns, strict=True)
    ]
    return Head(shard.attrs, rows, [digest.tobytes() for digest in shard.columns["digest"]])


def check_shard(path: Path, fingerprint: str) -> None:
    """Read all of a shard. Raises PipelineError if it is damaged anywhere, or not the one with this fingerprint."""
    read_head(path, fingerprint)
    with _opened(path) as file:
        for name in list(file):  # values() would give None for a damaged one
            dataset = file[name]
            for chunk in dataset.iter_chunks() if dataset.chunks else ():
                dataset[chunk]


def _open(path: Path) -> _Shard:
    with _opened(path) as file:
        attrs = {name: (v.item() if isinstance(v, np.generic) else v) for name, v in file.attrs.items()}
        attrs = {name: (v.decode() if isinstance(v, bytes) else v) for name, v in attrs.items()}
        if attrs.get("schema") != SCHEMA:
            raise PipelineError(f"{path}: schema {attrs.get('schema')}, expected {SCHEMA}; {_rebuild(path.parent)}")
        return _Shard(path, attrs, {name: file[name][:] for name in ("clip_id", "present", "reason", "died", "digest")})


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The file for reading, without HDF5's locks: a store is written whole and never changed.

    What h5py raises on a damaged file becomes one line that names it and the way out. Raises OSError where the file
    can't be read just now: it may be whole.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (OSError, KeyError, RuntimeError, UnicodeDecodeError) as error:
        number = getattr(error, "errno", None)
        if number and number not in (errno.ENOENT, errno.ENOTDIR):  # HDF5 has none for what is wrong with the content
            raise OSError(number, os.strerror(number), str(path)) from error
        raise PipelineError(f"{path}: damaged ({one_line(error)}); {_rebuild(path.parent)}") from error


def _rebuild(folder: Path) -> str:
    return f"rebuild it with: mer repair {folder} && dvc repro"
