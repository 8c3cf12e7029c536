"""Speech recognition that says when each sentence is spoken: long recordings -> segments with their words.

Whisper marks begin and end of what it writes down with timestamp tokens. Of a CTC model the frames say when each
character is heard: a segment ends where none is for PAUSE_SECONDS. Other speech-to-text models give no times.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.encoders.asr import Config, Recognizer
from stages.engine.errors import PipelineError

PAUSE_SECONDS = 0.5  # of a CTC model; shorter pauses are those within a sentence
PAD_SECONDS = 0.2  # a CTC model's characters are peaks, shorter than the sounds that they stand for
WINDOWS = 4  # of a recording at once, in models that take several


@dataclass(frozen=True)
class Said:
    """What is said from `start` to `end`, seconds from the recording's start."""

    start: float
    end: float
    text: str


class TimedRecognizer(Recognizer):
    """A Recognizer whose `encode` gives a list of Said for each waveform, in order of time."""

    def __init__(self, config: Config, device: str) -> None:
        super().__init__(config, device)
        generation = getattr(self._model, "generation_config", None)
        before = getattr(generation, "no_timestamps_token_id", None)  # the last token before the timestamps
        self._timestamps = None if before is None else before + 1
        whisper = self._family == "whisper" and before is not None and before + 1 < self._model.config.vocab_size
        if not self._is_ctc and not whisper:
            raise PipelineError(f"checkpoint {self._checkpoint}: its words come without times (model_type "
                                f"{self._family}); expected a Whisper or CTC checkpoint, or use --segment vad")

    @torch.inference_mode()
    def encode(self, batch: list[np.ndarray]) -> list[Any]:
        """Waveforms float32 (m,) -> for each a list of Said. Raises PipelineError as Recognizer.encode does."""
        return [self._said(waveform) for waveform in batch]

    def _said(self, waveform: np.ndarray) -> list[Said]:
        pieces = list(self.windows(waveform))
        together = WINDOWS if self._masks or not self._is_ctc else 1
        found: list[Said] = []
        offset = 0.0
        for start in range(0, len(pieces), together):
            group = pieces[start : start + together]
            for piece, said in zip(group, self._times(group), strict=True):
                seconds = len(piece) / self.sample_rate
                found += [Said(offset + max(0.0, a), offset + min(b, seconds), text)
                          for a, b, text in said if text and a < min(b, seconds)]
                offset += seconds
        return found

    def _times(self, pieces: list[np.ndarray]) -> list[list[tuple[float, float, str]]]:
        inputs = self._inputs(pieces)
        if self._is_ctc:
            best = self._best(inputs)
            return [self._spans(ids, len(piece) / self.sample_rate / len(ids))
                    for ids, piece in zip(best, pieces, strict=True)]
        found = self._model.generate(**inputs, **self._generation, return_timestamps=True, return_segments=True)
        return [[(float(part["start"]), float(part["end"]), self._words(part["tokens"].tolist())) for part in parts]
                for parts in found["segments"]]

    def _words(self, tokens: list[int]) -> str:
        words = [token for token in tokens if self._timestamps is None or token < self._timestamps]
        return self._tokenizer.decode(words, skip_special_tokens=True).strip()

    def _spans(self, ids: list[int], frame: float) -> list[tuple[float, float, str]]:
        """Runs of frames with characters, no more than PAUSE_SECONDS apart; `frame`: seconds that one lasts."""
        tokenizer = self._tokenizer
        silent = {*tokenizer.all_special_ids, tokenizer.pad_token_id}
        silent.add(tokenizer.convert_tokens_to_ids(getattr(tokenizer, "word_delimiter_token", None) or "|"))
        heard = np.flatnonzero(~np.isin(ids, [i for i in silent if i is not None]))
        if not len(heard):
            return []
        runs = np.split(heard, np.flatnonzero(np.diff(heard) * frame > PAUSE_SECONDS) + 1)
        return [(run[0] * frame - PAD_SECONDS, (run[-1] + 1) * frame + PAD_SECONDS,
                 self._collapse(ids[run[0] : run[-1] + 1]).strip()) for run in runs]
