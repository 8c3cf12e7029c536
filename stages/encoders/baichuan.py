"""Baichuan and other text models: ranking sentence + transcript -> (T, C) token features (paper section 3).

Baichuan-13B (ALiBi) and 7B (rotary) run in our own decoder, since their published code fails on
transformers 5 and remote code is never executed: RMSNorm, packed QKV, SwiGLU, no cache. Any other
causal or masked language model that transformers knows loads by name. Features are the sum of chosen
hidden states (entry 0 the embeddings, the last one after the final norm) over the text's own tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn import functional

from stages.encoders.checkpoints import (
    DTYPES,
    Dtype,
    hidden_state_entries,
    load_model,
    load_part,
    read_json,
    resolve,
)
from stages.engine.errors import NO_TRANSCRIPT, PipelineError, Skip, one_line

# Masked language models' sentence head: no part of the token features
_UNUSED = ("pooler.",)
# What a CPU's caches hold: texts of 20 to 60 tokens run fastest in batches of about so many tokens
_CPU_TOKENS = 512


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Config:
    """The keys of an extractors row in params.yaml that name this encoder."""

    checkpoint: str  # folder or hub name
    revision: str | None
    dtype: Dtype
    layers: Annotated[list[int], Field(min_length=1)]  # entries of the hidden states; negative = from the end
    max_tokens: Annotated[int, Field(ge=2)]  # longer texts lose their end


def compose(transcript: str, ranking: list[str]) -> str:
    """The paper's prompt (section 3): the labels in one sentence, most likely first, then the transcript."""
    return f"情感可能性从高到低：{'、'.join(ranking)}。{transcript}"


class Encoder:
    """dimension: C. unit_bytes: peak activation bytes per token in a batch."""

    padded, concurrent = True, True
    variance = True  # over time is a feature

    def __init__(self, config: Config, device: str) -> None:
        folder = resolve(config.checkpoint, config.revision)
        settings = read_json(folder / "config.json", config.checkpoint)
        ours = settings.get("model_type") == "baichuan"
        self._model = (_Baichuan if ours else _Other)(folder, settings, config, device)
        self._dtype, self._device = DTYPES[config.dtype], device
        self.chunk_tokens: float = _CPU_TOKENS if device.startswith("cpu") else float("inf")
        self.dimension: int = self._model.dimension
        self.unit_bytes: int = self._model.unit_bytes

    def prepare(self, item: str | dict[str, Any]) -> np.ndarray:
        """A transcript, or {"transcript", "ranking"} -> int64 (2, n): token ids, and 1 where a token is the text's own.

        Texts over max_tokens lose their end. Raises Skip for an empty transcript, or where the provider gave no
        ranking (`ranking` None, with the `reason`).
        """
        transcript = (item if isinstance(item, str) else item["transcript"]).strip()
        if not transcript:
            raise Skip(NO_TRANSCRIPT)
        if isinstance(item, dict) and item["ranking"] is None:
            raise Skip(f"no ranking: {item['reason']}")
        text = transcript if isinstance(item, str) else compose(transcript, item["ranking"])
        ids, own = self._model.tokenize(text)
        if not any(own):
            raise Skip("no tokens in the transcript")
        return np.array([ids, own], dtype=np.int64)

    def size(self, prepared: np.ndarray) -> int:
        """Tokens."""
        return prepared.shape[1]

    @torch.inference_mode()
    def encode(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        """What prepare made -> features float32 (T, C) each, T = the text's own tokens.

        Raises PipelineError when half precision overflows.
        """
        features = torch.cat([self._forward(chunk) for chunk in self._chunks(batch)]).cpu().numpy()
        if not np.isfinite(features).all():
            raise PipelineError(f"features are not finite in {self._dtype}; use dtype bfloat16 or float32")
        return np.split(features, np.cumsum([prepared[1].sum() for prepared in batch])[:-1])

    def _chunks(self, batch: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """The batch in pieces of at most chunk_tokens, padding included, or of one text."""
        start, longest = 0, 0
        for stop, prepared in enumerate(batch):
            longest = max(longest, prepared.shape[1])
            if stop > start and longest * (stop + 1 - start) > self.chunk_tokens:
                yield batch[start:stop]
                start, longest = stop, prepared.shape[1]
        yield batch[start:]

    def _forward(self, batch: list[np.ndarray]) -> torch.Tensor:
        """One pass of the model, right-padded -> the texts' own tokens one after another (sum of T, C)."""
        padded = np.zeros((3, len(batch), max(prepared.shape[1] for prepared in batch)), dtype=np.int64)
        for row, prepared in enumerate(batch):
            padded[:2, row, : prepared.shape[1]] = prepared
            padded[2, row, : prepared.shape[1]] = 1
        ids, own, real = torch.from_numpy(padded).to(self._device)
        return self._model.sum_states(ids, real)[own.bool()]


class _Baichuan:
    """The published Baichuan layout: config.json, weights, tokenizer.model, tokenizer_config.json."""

    def __init__(self, folder: Path, settings: dict[str, Any], config: Config, device: str) -> None:
        import sentencepiece

        name = config.checkpoint
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except Exception as error:  # OSError or RuntimeError by what is wrong
            raise PipelineError(f"checkpoint {name}: tokenizer.model can't be read: {one_line(error)}") from None
        self.decoder = load_decoder(folder, name, config.dtype, device, config.layers)
        vocabulary = self.decoder.embed_tokens.num_embeddings
        if len(self._pieces) > vocabulary:
            raise PipelineError(
                f"checkpoint {name}: tokenizer.model has {len(self._pieces)} tokens, "
                f"model.embed_tokens.weight only {vocabulary} rows"
            )
        options = folder / "tokenizer_config.json"
        prepend = options.is_file() and read_json(options, name).get("add_bos_token", False)
        self._start = [self._pieces.bos_id()] if prepend else []
        self._limit = config.max_tokens
        self.dimension: int = settings["hidden_size"]
        # the residual stream, its norm, queries, keys, values, attention and the MLP's three, and the sum in float32
        width = 8 * self.dimension + 3 * settings["intermediate_size"]
        self.unit_bytes: int = width * DTYPES[config.dtype].itemsize + 8 * self.dimension

    def tokenize(self, text: str) -> tuple[list[int], list[int]]:
        ids = (self._start + self._pieces.encode(text))[: self._limit]
        own = [0] * len(self._start) + [1] * (len(ids) - len(self._start))
        return ids, own

    def sum_states(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        # causal: what stands right of a token, padding included, can't change it
        return self.decoder(ids)


class _Other:
    """Any text model that transformers runs with its own code."""

    def __init__(self, folder: Path, settings: dict[str, Any], config: Config, device: str) -> None:
        name = config.checkpoint
        if settings.get("is_encoder_decoder"):
            raise PipelineError(f"checkpoint {name}: an encoder-decoder; expected a causal or masked language model")
        self._model = load_model("AutoModel", folder, name, DTYPES[config.dtype], _UNUSED).to(device)
        self._tokenizer = load_part("AutoTokenizer", folder, name)
        inner = self._model.config.get_text_config()
        self._layers = hidden_state_entries(config.layers, inner.num_hidden_layers + 1, name)
        positions = getattr(inner, "max_position_embeddings", None) or config.max_tokens
        self._limit = min(config.max_tokens, self._tokenizer.model_max_length, positions)
        self.tokenize("文")  # sets the shared tokenizer's truncation before threads use it
        self.dimension: int = inner.hidden_size
        # transformers keeps every hidden state until the end
        width = (len(self._layers) + inner.num_hidden_layers + 20) * self.dimension
        self.unit_bytes: int = width * DTYPES[config.dtype].itemsize + 8 * self.dimension

    def tokenize(self, text: str) -> tuple[list[int], list[int]]:
        # truncation by the tokenizer keeps the closing special token
        tokens = self._tokenizer(text, truncation=True, max_length=self._limit, return_special_tokens_mask=True)
        return tokens["input_ids"], [1 - special for special in tokens["special_tokens_mask"]]

    def sum_states(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        # models that count positions by the padding token need their own
        ids = ids.masked_fill(real == 0, self._tokenizer.pad_token_id or 0)
        states = self._model(ids, attention_mask=real, output_hidden_states=True).hidden_states
        return torch.stack([states[index].float() for index in self._layers]).sum(0)


class Decoder(nn.Module):
    """Baichuan's decoder with the checkpoint's own parameter names (without "model.").

    Rotary positions if the config has max_position_embeddings, as both published 7B's have, else
    ALiBi, as in both published 13B's, whose config has model_max_length alone.
    """

    def __init__(self, settings: dict[str, Any], layers: list[int], name: str) -> None:
        super().__init__()
        count, width, self.heads = (
            settings["num_hidden_layers"],
            settings["hidden_size"],
            settings["num_attention_heads"],
        )
        if width % self.heads or settings.get("hidden_act", "silu") != "silu":
            raise PipelineError(
                f"checkpoint {name}: hidden_size {width}, num_attention_heads {self.heads} and hidden_act "
                f"{settings.get('hidden_act')!r} are no Baichuan's: expected a multiple and 'silu'"
            )
        self.rotary = "max_position_embeddings" in settings
        self.layers_summed = hidden_state_entries(layers, count + 1, name)
        epsilon = settings["rms_norm_eps"]
        self.embed_tokens = nn.Embedding(settings["vocab_size"], width)
        # the layers above the last wanted one are never built nor read
        depth = max(self.layers_summed)
        self.layers = nn.ModuleList(
            _Layer(width, self.heads, settings["intermediate_size"], epsilon) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=epsilon) if depth == count else None
        self._bias: torch.Tensor | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L), padded on the right -> the sum of the chosen hidden states, float32 (B, L, C)."""
        total = torch.zeros((), device=ids.device)
        for index, state in enumerate(self.states(ids)):
            if index in self.layers_summed:
                # on the first device, where load_decoder spread the layers
                total = total + state.to(total.device, torch.float32)
        return total

    def states(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Token ids (B, L) -> each hidden state (B, L, C) in turn: embeddings, after each layer, the last normed."""
        x = self.embed_tokens(ids)
        length = ids.shape[1]
        bias = None if self.rotary else self._alibi(length, x)
        angles = self._angles(length, x) if self.rotary else None
        for layer in self.layers:
            yield x
            x = layer(x, bias, angles)
        yield x if self.norm is None else self.norm(x)

    def _alibi(self, length: int, x: torch.Tensor) -> torch.Tensor:
        """Causal ALiBi bias (heads, length, length): the same for every text, so the longest one's is kept.

        Made in steps of 64 tokens and sliced, which also leaves its rows aligned for the fused kernels.
        """
        bias = self._bias  # threads may exchange it
        if bias is None or bias.shape[1] < length:
            positions = torch.arange(-(-length // 64) * 64, device=x.device)
            distance = positions[None, :] - positions[:, None]  # <= 0 for the past
            bias = torch.tensor(_slopes(self.heads), device=x.device)[:, None, None] * distance
            self._bias = bias = bias.masked_fill(distance > 0, -torch.inf).to(x.dtype)
        return bias[:, :length, :length]

    def _angles(self, length: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (length, C / heads) of the rotary positions, float32."""
        size = x.shape[-1] // self.heads
        frequencies = 10000.0 ** (-torch.arange(0, size, 2, device=x.device) / size)
        angles = torch.outer(torch.arange(length, device=x.device), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm = nn.RMSNorm(width, eps=epsilon)
        self.self_attn = nn.ModuleDict(
            {"W_pack": nn.Linear(width, 3 * width, bias=False), "o_proj": nn.Linear(width, width, bias=False)}
        )
        self.post_attention_layernorm = nn.RMSNorm(width, eps=epsilon)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, inner, bias=False),
                "up_proj": nn.Linear(width, inner, bias=False),
                "down_proj": nn.Linear(inner, width, bias=False),
            }
        )

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None, angles: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """(B, L, C) -> (B, L, C)."""
        packed = self.self_attn["W_pack"](self.input_layernorm(x))
        query, key, value = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if angles is not None:
            query, key = _rotate(query, *angles), _rotate(key, *angles)
        if bias is not None:
            bias = bias.expand(len(x), -1, -1, -1)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None)
        # in place where a tensor is new: on a CPU allocating costs as much as adding
        x = self.self_attn["o_proj"](attended.transpose(1, 2).flatten(2)).add_(x)
        normed = self.post_attention_layernorm(x)
        gated = functional.silu(self.mlp["gate_proj"](normed), inplace=True).mul_(self.mlp["up_proj"](normed))
        return self.mlp["down_proj"](gated).add_(x)


def load_decoder(folder: Path, checkpoint: str, dtype: Dtype, device: str, layers: list[int]) -> Decoder:
    """The decoder of a published Baichuan folder, its weights in `dtype` on `device`, for the sum of `layers`.

    A decoder too large for one GPU is spread over all visible ones. Raises PipelineError naming the key
    that config.json lacks, the tensor that is missing or misshapen, or the memory that is short.
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    settings = read_json(folder / "config.json", checkpoint)

    class Published(PreTrainedModel):  # gives the decoder's parameters the names that they have in the files
        config_class = PreTrainedConfig

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.model = Decoder(settings, layers, checkpoint)
            self.post_init()

    try:
        with torch.device("meta"):
            empty = Published(PreTrainedConfig())
    except KeyError as error:
        raise PipelineError(f"checkpoint {checkpoint}: config.json lacks {error}") from None
    places = _placement(empty, checkpoint, DTYPES[dtype], device)
    published = load_model(
        Published, folder, checkpoint, DTYPES[dtype], config=PreTrainedConfig(), device_map=places
    )
    return published.model.requires_grad_(False)


def _placement(model: nn.Module, checkpoint: str, dtype: torch.dtype, device: str) -> dict[str, str | int]:
    """Module name -> device: everything on `device` where it fits, else shared out over the visible GPUs."""
    need = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if not device.startswith("cuda") or need < 0.9 * torch.cuda.mem_get_info(device)[0]:
        return {"": device}
    from accelerate import infer_auto_device_map

    room = {gpu: int(0.85 * torch.cuda.mem_get_info(gpu)[0]) for gpu in range(torch.cuda.device_count())}
    places = infer_auto_device_map(model, max_memory=room, no_split_module_classes=["_Layer"], dtype=dtype)
    if "disk" in places.values():
        raise PipelineError(
            f"checkpoint {checkpoint}: needs {need / 2**30:.1f} GiB in {dtype}, the GPUs have "
            f"{sum(room.values()) / 2**30:.1f} GiB free"
        )
    return places


def _slopes(heads: int) -> list[float]:
    """ALiBi's slope per head (Press et al. 2022): geometric for a power of two, else filled up from twice as many."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions on (B, heads, L, D), halves paired; in float32, since half precision loses far positions."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)
