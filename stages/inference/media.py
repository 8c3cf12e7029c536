"""Decoding new clips with the media stages' own functions, ahead of the encoders, in workers that may crash."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from stages.engine.errors import Skip, is_machines
from stages.engine.manifest import Source
from stages.engine.params import Params
from stages.engine.per_clip import Decode, result_row
from stages.engine.store import Row
from stages.engine.workers import Workers
from stages.inference.clips import name_of
from stages.media.audio import audio_decoder
from stages.media.face_crops import faces_decoder
from stages.media.frames import frames_decoder

CHUNK = 32  # clips that are decoded and encoded together at most
DECODERS = {"audio": audio_decoder, "frames": frames_decoder, "faces": faces_decoder}

Functions = dict[str, Decode]  # by medium
Decoded = tuple[Sequence[Source], dict[str, list[Row]]]  # clips, and medium -> a row for each


def media_functions(p: Params, media: set[str]) -> Functions:
    """What the stages extract_audio, slice_frames and crop_faces run, for those of `media` that are decoded."""
    return {medium: decoder(p) for medium, decoder in DECODERS.items() if medium in media}


def chunks(clips: Sequence[Source]) -> Iterator[Sequence[Source]]:
    """1, 2, 4 ... up to CHUNK clips at a time, so that the first result does not wait for a whole chunk."""
    start, size = 0, 1
    while start < len(clips):
        yield clips[start : start + size]
        start, size = start + size, min(2 * size, CHUNK)


class Decoding:
    """Iterates over the clips in chunks, decoded. The first chunk is begun at once, then each during the one before."""

    def __init__(self, clips: Sequence[Source], functions: Functions, workers: Workers):
        self._chunks, self._functions, self._workers = chunks(clips), functions, workers
        self._begun: deque[tuple[Sequence[Source], dict[str, Iterator[Any]]]] = deque()
        self._begin()

    def __iter__(self) -> Iterator[Decoded]:
        while self._begun:
            self._begin()
            clips, results = self._begun.popleft()
            yield clips, {medium: _rows(clips, found) for medium, found in results.items()}

    def _begin(self) -> None:
        clips = next(self._chunks, None)
        if clips is not None:
            tasks = [(name_of(clip), clip) for clip in clips]
            results = {medium: self._workers.map(function, tasks) for medium, function in self._functions.items()}
            self._begun.append((clips, results))


def _rows(clips: Sequence[Source], results: Iterator[Any]) -> list[Row]:
    return [result_row(name_of(clip), usable(result)) for clip, result in zip(clips, results, strict=True)]


def usable(result: Any) -> Any:
    """What a worker gave; nothing here is kept, so a fault of the machine is only this prediction's reason."""
    if is_machines(result):
        return Skip(f"can't be read: {result.strerror if isinstance(result, OSError) else 'no memory'}")
    return result
