"""Decoding new clips with the media stages' own functions, ahead of the encoders, in workers that may crash."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from stages.crop_faces import faces_row
from stages.engine.errors import Skip
from stages.engine.params import Params
from stages.engine.store import Row
from stages.engine.workers import Workers
from stages.extract_audio import audio_row
from stages.media import openface
from stages.slice_frames import frames_row

CHUNK = 32  # clips that are decoded and encoded together at most

Functions = dict[str, Callable[[str, str], Row]]  # medium -> (clip_id, path) -> its row
Decoded = tuple[Sequence[Path], dict[str, list[Row]]]  # clips, and medium -> a row for each


def media_functions(p: Params, media: set[str]) -> Functions:
    """What the stages extract_audio, slice_frames and crop_faces run, for those of `media` that are decoded.

    Raises PipelineError where the face detector needs a binary that is not there.
    """
    if "faces" in media and p.faces.detector == "openface":
        openface.find_binary(p.faces.openface_binary)
    functions: Functions = {
        "audio": partial(audio_row, sample_rate=p.audio.sample_rate),
        "frames": partial(frames_row, **p.frames.model_dump()),
        "faces": partial(faces_row, faces=p.faces, time_limit=0.9 * p.runtime.clip_timeout_seconds),
    }
    return {medium: function for medium, function in functions.items() if medium in media}


def chunks(clips: Sequence[Path]) -> Iterator[Sequence[Path]]:
    """1, 2, 4 ... up to CHUNK clips at a time, so that the first result does not wait for a whole chunk."""
    start, size = 0, 1
    while start < len(clips):
        yield clips[start : start + size]
        start, size = start + size, min(2 * size, CHUNK)


class Decoding:
    """Iterates over the clips in chunks, decoded. The first chunk is begun at once, then each during the one before."""

    def __init__(self, clips: Sequence[Path], functions: Functions, workers: Workers):
        self._chunks, self._functions, self._workers = chunks(clips), functions, workers
        self._begun: deque[tuple[Sequence[Path], dict[str, Iterator[Row | Skip]]]] = deque()
        self._begin()

    def __iter__(self) -> Iterator[Decoded]:
        while self._begun:
            self._begin()
            clips, results = self._begun.popleft()
            yield clips, {medium: _rows(clips, found) for medium, found in results.items()}

    def _begin(self) -> None:
        clips = next(self._chunks, None)
        if clips is not None:
            tasks = [(str(clip), str(clip)) for clip in clips]
            results = {medium: self._workers.map(function, tasks) for medium, function in self._functions.items()}
            self._begun.append((clips, results))


def _rows(clips: Sequence[Path], results: Iterator[Row | Skip]) -> list[Row]:
    return [
        Row(str(clip), reason=str(result)) if isinstance(result, Skip) else result
        for clip, result in zip(clips, results, strict=True)
    ]
