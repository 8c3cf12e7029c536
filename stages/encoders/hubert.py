"""HuBERT and its relatives: a waveform -> (T, C) speech features at 50 Hz (paper section 3: chinese-hubert-large).

Features are the sum of chosen hidden states. Entry 0 is the input of the first transformer layer,
entry i the output of layer i, and the last entry is taken AFTER the encoder's final layer norm (what
transformers 4 returned and the published features are; transformers 5 returns it before).
Loads HuBERT, wav2vec2, WavLM, UniSpeech and data2vec-audio checkpoints by name alike.
"""

import threading
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from stages.encoders.checkpoints import DTYPES, Dtype, hidden_state_entries, load_model, read_json, resolve
from stages.engine.errors import PipelineError, Skip

_FAMILIES = {"hubert", "wav2vec2", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio"}
# Only read in training (SpecAugment); checkpoints converted from fairseq lack it
_UNUSED = ("masked_spec_embed",)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Config:
    """The keys of an extractors row in params.yaml that name this encoder."""

    checkpoint: str  # folder or hub name
    revision: str | None
    dtype: Dtype
    layers: Annotated[list[int], Field(min_length=1)]  # entries of the hidden states; negative = from the end
    resample: bool  # to the checkpoint's own rate; false: feed the samples as they come
    window_seconds: Annotated[float, Field(ge=1)]  # longer clips are encoded in windows


class Encoder:
    """dimension: C. unit_bytes: peak activation bytes per audio sample in a batch."""

    padded, concurrent = True, True
    variance = True  # over time is a feature

    def __init__(self, config: Config, device: str) -> None:
        folder = resolve(config.checkpoint, config.revision)
        name = config.checkpoint
        family = read_json(folder / "config.json", name).get("model_type")
        if family not in _FAMILIES:
            raise PipelineError(f"checkpoint {name}: model_type {family!r} is none of {sorted(_FAMILIES)}")
        processor = read_json(folder / "preprocessor_config.json", name)
        self.sample_rate: int = processor.get("sampling_rate", 16000)  # Hz; the defaults are transformers'
        self._normalize: bool = processor.get("do_normalize", True)

        # float32 first: the positional convolution's weight norm is folded at full precision
        model = load_model("AutoModel", folder, name, torch.float32, _UNUSED)
        for module in model.modules():
            if torch.nn.utils.parametrize.is_parametrized(module, "weight"):
                torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
        self._model = model.to(device, DTYPES[config.dtype])
        self._dtype, self._device = DTYPES[config.dtype], device
        if device.startswith("cpu") and self._dtype != torch.float32:
            self._convolve_positions_in_float32()
        published = model.config
        self.dimension: int = published.hidden_size
        self._kernels = list(zip(published.conv_kernel, published.conv_stride, strict=True))
        self._stride = int(np.prod(published.conv_stride))
        self._receptive = 1  # samples behind one feature frame
        for kernel, stride in reversed(self._kernels):
            self._receptive = (self._receptive - 1) * stride + kernel
        self._resample = config.resample
        self._window = int(config.window_seconds * self.sample_rate)

        # Group norm averages over time and data2vec's stacked positional convolutions reach into the
        # padding, mask or not: such models only batch clips of one length. On a CPU padding is pure
        # cost: clips go one by one, on every core another.
        self.maskable: bool = family != "data2vec-audio" and published.feat_extract_norm == "layer"
        self.batching: Literal["alone", "equal", "padded"] = (
            "alone" if device.startswith("cpu") else "padded" if self.maskable else "equal"
        )
        # Largest at the first convolution: its output, the norm's transposes and the activation
        width = published.conv_dim[0] / published.conv_stride[0]
        self.unit_bytes: int = int(np.ceil(4 * width + 12 * self.dimension / self._stride)) * self._dtype.itemsize
        self._listen(config.layers, name)

    def _convolve_positions_in_float32(self) -> None:
        """On CPUs with AMX torch 2.15's bfloat16 convolution of 128 taps in groups gives entirely wrong numbers."""
        for module in self._model.encoder.pos_conv_embed.modules():
            if isinstance(module, torch.nn.Conv1d):
                module.float()
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
                module.register_forward_hook(lambda _, __, output: output.to(self._dtype))

    def _listen(self, layers: list[int], name: str) -> None:
        """Hook the wanted hidden states, so that their sum is all that is kept; drop the layers above them."""
        encoder = self._model.encoder
        count = len(encoder.layers) + 1
        wanted = hidden_state_entries(layers, count, name)
        self._pass = threading.local()

        def add(state: torch.Tensor) -> None:
            total = self._pass.total
            self._pass.total = state.float() if total is None else total + state.float()

        for index in wanted:
            if index == 0:
                encoder.layers[0].register_forward_pre_hook(lambda _, inputs: add(inputs[0]))
            elif index < count - 1:
                # WavLM's layers return a tuple
                encoder.layers[index - 1].register_forward_hook(
                    lambda _, __, output: add(output[0] if isinstance(output, tuple) else output)
                )
            else:
                encoder.register_forward_hook(lambda _, __, output: add(output[0]))
        encoder.layers = encoder.layers[: max(max(wanted), 1)]

    def prepare(self, item: tuple[np.ndarray, int]) -> np.ndarray:
        """Samples int16 (n,) and their rate in Hz -> float32 (m,) as the checkpoint expects them.

        Resampled to the checkpoint's rate unless resample is false, and normalised over the whole clip
        where its preprocessor_config says so. Raises Skip for a clip shorter than one feature frame.
        """
        samples, rate = item
        waveform = samples.astype(np.float32) / 32768
        if self._resample and rate != self.sample_rate and len(waveform):
            import soxr

            waveform = soxr.resample(waveform, rate, self.sample_rate)
        if len(waveform) < self._receptive:
            raise Skip(f"{len(samples)} samples of audio: shorter than the encoder's one frame")
        return self.normalize(waveform)

    def normalize(self, waveform: np.ndarray) -> np.ndarray:
        """Float32 (m,) to zero mean and unit variance if the checkpoint asks for it; silence gives zeros."""
        if not self._normalize:
            return waveform
        mean, variance = waveform.mean(dtype=np.float64), waveform.var(dtype=np.float64)
        return ((waveform - mean) / np.sqrt(variance + 1e-7)).astype(np.float32)

    def size(self, prepared: np.ndarray) -> int:
        """Samples."""
        return len(prepared)

    @torch.inference_mode()
    def encode(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        """Waveforms float32 (m,) -> features float32 (T, C) each, T = one frame per 20 ms.

        Clips over window_seconds are encoded in windows of equal length, one at a time, and their
        frames joined. Raises PipelineError when half precision overflows.
        """
        pieces: list[list[torch.Tensor]] = [[] for _ in batch]
        for indices in self._groups([len(waveform) for waveform in batch]):
            for index, features in zip(indices, self._forward([batch[i] for i in indices]), strict=True):
                pieces[index].append(features)
        for index, waveform in enumerate(batch):
            if not pieces[index]:
                pieces[index] = [self._forward([window])[0] for window in self._windows(waveform)]
        lengths = [sum(len(piece) for piece in clip) for clip in pieces]
        joined = torch.cat([piece for clip in pieces for piece in clip]).cpu().numpy()
        if not np.isfinite(joined).all():
            raise PipelineError(f"features are not finite in {self._dtype}; use dtype bfloat16 or float32")
        return np.split(joined, np.cumsum(lengths)[:-1])

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        """Indices of the clips without windows that go through the model together."""
        short = [index for index, length in enumerate(lengths) if length <= self._window]
        if self.batching == "alone":
            return [[index] for index in short]
        if self.batching == "padded":
            return [short] if short else []
        return [[i for i in short if lengths[i] == length] for length in sorted({lengths[i] for i in short})]

    def _windows(self, waveform: np.ndarray) -> list[np.ndarray]:
        """Equal windows, cut on the frame grid; so none is a tail too short for one frame."""
        count = -(-len(waveform) // self._window)
        edges = [round(len(waveform) * i / count / self._stride) * self._stride for i in range(1, count)]
        return np.split(waveform, edges)

    def _forward(self, waveforms: list[np.ndarray]) -> list[torch.Tensor]:
        """One pass of the model, right-padded and masked where lengths differ -> (T, C) each, on the device."""
        lengths = [len(waveform) for waveform in waveforms]
        padded = np.zeros((len(waveforms), max(lengths)), dtype=np.float32)
        mask = np.zeros(padded.shape, dtype=np.int64)
        for row, length in enumerate(lengths):
            padded[row, :length] = waveforms[row]
            mask[row, :length] = 1
        values = torch.from_numpy(padded).to(self._device, self._dtype)
        uneven = min(lengths) < max(lengths)
        self._pass.total = None
        self._model(values, attention_mask=torch.from_numpy(mask).to(self._device) if uneven else None)
        total, self._pass.total = self._pass.total, None
        return [states[: self._frames(length)] for states, length in zip(total, lengths, strict=True)]

    def _frames(self, samples: int) -> int:
        """Feature frames that the convolutions make of so many samples."""
        for kernel, stride in self._kernels:
            samples = (samples - kernel) // stride + 1
        return samples
