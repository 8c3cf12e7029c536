"""Speech recognition: a clip's waveform -> its transcript, for clips that come without one.

Any checkpoint that transformers loads with a CTC head (wav2vec2, HuBERT, WavLM ...) or as a speech-to-text model that
needs no prompt (Whisper ...). Greedy, so that the same audio gives the same text. Waveforms over 30 s, the span that
Whisper was trained on, are cut into windows at the quietest moment near the end of each, and the texts joined.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from stages.encoders.checkpoints import DTYPES, Dtype, load_model, load_part, read_json, resolve
from stages.engine.encoding import Encode
from stages.engine.errors import PipelineError, Skip
from stages.engine.params import Runtime, Transcribe
from stages.engine.store import Row

WINDOW_SECONDS = 30
SEARCH_SECONDS = 5  # the quietest moment is looked for in this last part of a window
QUIET_SECONDS = 0.1  # over which loudness is measured; nothing shorter holds a word
FRAMES_PER_SECOND = 50  # of wav2vec2's family and of Whisper, for the memory estimate

# Speech-to-text families whose generate() needs the audio alone; the others need a prompt, each in a form of its own.
SEQ2SEQ = ("whisper", "speech_to_text", "speech-encoder-decoder", "moonshine")


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Config:
    """The keys of `transcribe` in params.yaml."""

    checkpoint: str  # folder or hub name
    revision: str | None
    language: str | None  # for checkpoints that take one; the others ignore it
    dtype: Dtype


def recognise_work(transcribe: Transcribe, read: Callable[[Any], Any], runtime: Runtime) -> Encode:
    """The engine's work that recognises what `read` gives for a clip's item; its rows hold the texts."""
    return Encode(partial(_make, config=Config(**transcribe.model_dump())), read, _text_row, runtime)


def _make(device: str, config: Config) -> "Recognizer":
    return Recognizer(config, device)


def _text_row(_: Any, clip_id: str, text: str) -> Row:
    return Row(clip_id, values=text)


class Recognizer:
    """dimension: the network's width. unit_bytes: estimated peak activation bytes per sample of a padded batch."""

    padded, concurrent = True, False  # generate keeps state in the model

    def __init__(self, config: Config, device: str) -> None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

        name = config.checkpoint
        folder = resolve(name, config.revision)
        self._family = read_json(folder / "config.json", name).get("model_type")
        self._is_ctc = self._family in MODEL_FOR_CTC_MAPPING_NAMES
        if not self._is_ctc and self._family not in SEQ2SEQ:
            known = ", ".join([*MODEL_FOR_CTC_MAPPING_NAMES, *SEQ2SEQ])
            raise PipelineError(f"checkpoint {name}: found model_type {self._family!r}, expected one of {known}")
        self._checkpoint, self._dtype, self._device = name, DTYPES[config.dtype], device
        head = "AutoModelForCTC" if self._is_ctc else "AutoModelForSpeechSeq2Seq"
        self._model = load_model(head, folder, name, self._dtype).to(device)
        self._features = load_part("AutoFeatureExtractor", folder, name)
        self._tokenizer = load_part("AutoTokenizer", folder, name)
        self.sample_rate: int = self._features.sampling_rate  # Hz
        self._window = WINDOW_SECONDS * self.sample_rate
        if self._family == "whisper":
            self._window = min(self._window, self._features.n_samples)
        self._generation = {"num_beams": 1, "do_sample": False} | self._language(config.language)
        # A group norm averages over padding, mask or not, and only waveforms have known output lengths.
        published = self._model.config
        self.dimension: int = getattr(published, "d_model", getattr(published, "hidden_size", 1024))
        self._masks = (
            self._is_ctc
            and self._model.main_input_name == "input_values"
            and bool(self._features.return_attention_mask)
            and getattr(published, "feat_extract_norm", "layer") == "layer"
        )
        if hasattr(published, "conv_dim"):
            per_sample = 4 * published.conv_dim[0] / published.conv_stride[0]
        else:  # activations of a layer, and the decoder's cross-attention keys and values
            layers: int = getattr(published, "decoder_layers", 0)
            per_sample = (16 + 2 * layers) * self.dimension * FRAMES_PER_SECOND / self.sample_rate
        self.unit_bytes: int = math.ceil(per_sample * self._dtype.itemsize)

    def _language(self, language: str | None) -> dict[str, Any]:
        """generate()'s arguments for checkpoints that know languages. Raises PipelineError for one they do not know."""
        generation = getattr(self._model, "generation_config", None)
        known = getattr(generation, "lang_to_id", None)
        if language is None or not known or not getattr(generation, "is_multilingual", True):
            return {}
        if f"<|{language}|>" not in known:
            codes = ", ".join(sorted(code.strip("<|>") for code in known))
            raise PipelineError(f"transcribe.language: found {language!r}, expected one of {codes}")
        return {"language": language, "task": "transcribe"}

    def prepare(self, item: tuple[np.ndarray, int]) -> np.ndarray:
        """Samples int16 (n,) and their rate in Hz -> float32 (m,) at the checkpoint's rate. Skip if too short."""
        samples, rate = item
        waveform = samples.astype(np.float32) / 32768
        if rate != self.sample_rate and len(waveform):
            import soxr

            waveform = soxr.resample(waveform, rate, self.sample_rate)
        if len(waveform) < QUIET_SECONDS * self.sample_rate:
            raise Skip(f"{len(samples)} samples of audio: too short for a word")
        return waveform

    def size(self, prepared: np.ndarray) -> int:
        """Samples after padding: Whisper always pads to its window."""
        return self._window if self._family == "whisper" else len(prepared)

    @torch.inference_mode()
    def encode(self, batch: list[np.ndarray]) -> list[str]:
        """Waveforms float32 (m,) -> transcripts, stripped; "" where nothing was recognised.

        Raises PipelineError for values that are not finite (half precision that overflowed).
        """
        pieces = [(i, piece) for i, waveform in enumerate(batch) for piece in self.windows(waveform)]
        together = len(batch) if self._masks or not self._is_ctc else 1
        texts: list[list[str]] = [[] for _ in batch]
        for start in range(0, len(pieces), together):
            group = pieces[start : start + together]
            for (i, _), text in zip(group, self._recognize([piece for _, piece in group]), strict=True):
                texts[i].append(text.strip())
        return [" ".join(filter(None, parts)) for parts in texts]

    def windows(self, waveform: np.ndarray) -> Iterator[np.ndarray]:
        """Pieces of at most 30 s. Each cut lies at the quietest 0.1 s of the window's last 5 s."""
        quiet = int(QUIET_SECONDS * self.sample_rate)
        search = min(SEARCH_SECONDS * self.sample_rate, self._window // 2)
        while len(waveform) > self._window:
            start = self._window - search
            energy = np.cumsum(np.square(waveform[start : self._window], dtype=np.float64))
            cut = start + int(np.argmin(energy[quiet:] - energy[:-quiet])) + quiet // 2
            yield waveform[:cut]
            waveform = waveform[cut:]
        if len(waveform) >= quiet:
            yield waveform

    def _recognize(self, waveforms: list[np.ndarray]) -> list[str]:
        inputs = self._inputs(waveforms)
        if not self._is_ctc:
            tokens = self._model.generate(**inputs, **self._generation)
            return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [self._collapse(ids) for ids in self._best(inputs)]

    def _inputs(self, waveforms: list[np.ndarray]) -> Any:
        padding = {} if self._family == "whisper" else {"padding": True}
        inputs = self._features(waveforms, sampling_rate=self.sample_rate, return_tensors="pt",
                                return_attention_mask=self._masks or not self._is_ctc, **padding)
        inputs = inputs.to(self._device)
        main = self._model.main_input_name
        inputs[main] = inputs[main].to(self._dtype)
        return inputs

    def _best(self, inputs: Any) -> list[list[int]]:
        """Of a CTC model: every waveform's most likely token per frame."""
        logits = self._model(**inputs).logits
        if not logits.isfinite().all():
            raise PipelineError(f"checkpoint {self._checkpoint}: non-finite output; try transcribe.dtype: float32")
        best = logits.argmax(-1).cpu()
        lengths = [best.shape[1]] * len(best)
        if self._masks:
            lengths = self._model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1)).tolist()
        return [row[:length].tolist() for row, length in zip(best, lengths, strict=True)]

    def _collapse(self, ids: list[int]) -> str:
        """CTC's text: repeats joined, blanks (the padding token) dropped by the tokenizer, and so <unk> and </s>."""
        blank = self._tokenizer.pad_token_id
        special = set(self._tokenizer.all_special_ids)
        return self._tokenizer.decode([blank if i in special else i for i in ids])
