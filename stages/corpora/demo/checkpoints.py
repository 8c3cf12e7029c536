"""The demo's HuBERT and Baichuan checkpoints: the real architectures and file layouts, few and small layers.

Weights are random but seeded, and scaled so that pooled features still differ between clips: He-scaled
convolutions whose taps share a sign pattern (speech lives in the low frequencies), transformer layers of
scale 0.3 to 1. Same seed, same bytes.
"""

import io
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_CHANNELS = 32
_HUBERT_WIDTH = 64
_HUBERT_LAYERS = 4
_KERNELS, _STRIDES = [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]  # as published: 50 frames a second
_POSITIONS, _GROUPS = 128, 16  # positional convolution, as published

_BAICHUAN_WIDTH, _BAICHUAN_INNER = 96, 256
_BAICHUAN_LAYERS, _BAICHUAN_HEADS = 4, 6  # like the 13B's 40, six heads are no power of two

# Whole labels as tokens: a ranking sentence then takes 30 tokens instead of 60
_WORDS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]
_PUNCTUATION = "，。！？、："


def make_hubert(folder: Path, seed: int) -> None:
    """Write a layer-norm HuBERT (the layout of chinese-hubert-large) of 64 dimensions and 4 layers into folder."""
    _make_hubert(folder, seed, layer_norm=True)


def make_hubert_base(folder: Path, seed: int) -> None:
    """Write a group-norm HuBERT (the layout of chinese-hubert-base) of 64 dimensions and 4 layers into folder."""
    _make_hubert(folder, seed, layer_norm=False)


def make_baichuan(folder: Path, seed: int, sentences: list[str]) -> None:
    """Write a Baichuan-13B-like (ALiBi) decoder of 96 dimensions and 4 layers into folder.

    Its sentencepiece tokenizer is trained on `sentences`; characters that they lack become bytes.
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(sentences)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    _write_json(folder / "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": False})
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size()
    width, inner = _BAICHUAN_WIDTH, _BAICHUAN_INNER
    _write_json(
        folder / "config.json",
        {
            "architectures": ["BaichuanForCausalLM"],
            "model_type": "baichuan",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": _BAICHUAN_LAYERS,
            "num_attention_heads": _BAICHUAN_HEADS,
            "model_max_length": 4096,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
    )
    normal = _Normal(seed)
    weights = {"model.embed_tokens.weight": normal(vocabulary, width, scale=1)}
    for index in range(_BAICHUAN_LAYERS):
        layer = f"model.layers.{index}."
        weights[layer + "input_layernorm.weight"] = torch.ones(width)
        weights[layer + "self_attn.W_pack.weight"] = normal(3 * width, width, scale=1 / math.sqrt(width))
        weights[layer + "self_attn.o_proj.weight"] = normal(width, width, scale=1 / math.sqrt(width))
        weights[layer + "post_attention_layernorm.weight"] = torch.ones(width)
        weights[layer + "mlp.gate_proj.weight"] = normal(inner, width, scale=1 / math.sqrt(width))
        weights[layer + "mlp.up_proj.weight"] = normal(inner, width, scale=1 / math.sqrt(width))
        weights[layer + "mlp.down_proj.weight"] = normal(width, inner, scale=1 / math.sqrt(inner))
    weights["model.norm.weight"] = torch.ones(width)
    weights["lm_head.weight"] = normal(vocabulary, width, scale=1 / math.sqrt(width))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class _Normal:
    """Gaussian tensors from one seeded stream, apart from torch's global one."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * scale


def _make_hubert(folder: Path, seed: int, layer_norm: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    width, inner = _HUBERT_WIDTH, 2 * _HUBERT_WIDTH
    _write_json(
        folder / "config.json",
        {
            "architectures": ["HubertModel"],
            "model_type": "hubert",
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": _HUBERT_LAYERS,
            "num_attention_heads": 4,
            "conv_dim": [_CHANNELS] * len(_KERNELS),
            "conv_kernel": _KERNELS,
            "conv_stride": _STRIDES,
            "conv_bias": layer_norm,
            "feat_extract_norm": "layer" if layer_norm else "group",
            "do_stable_layer_norm": layer_norm,
            "feat_proj_layer_norm": True,
            "num_conv_pos_embeddings": _POSITIONS,
            "num_conv_pos_embedding_groups": _GROUPS,
            "num_feat_extract_layers": len(_KERNELS),
            "mask_time_prob": 0.05,
            "layerdrop": 0.1,
            "vocab_size": 32,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "do_normalize": True,
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": layer_norm,
            "sampling_rate": 16000,
        },
    )
    normal = _Normal(seed)
    weights = {"masked_spec_embed": normal(width, scale=1)}
    channels = 1
    for index, kernel in enumerate(_KERNELS):
        layer = f"feature_extractor.conv_layers.{index}."
        scale = 1 / math.sqrt(channels * kernel)  # He's, half of it shared by a filter's taps
        shared = normal(_CHANNELS, channels, 1, scale=scale)
        weights[layer + "conv.weight"] = normal(_CHANNELS, channels, kernel, scale=scale) + shared
        if layer_norm:
            weights[layer + "conv.bias"] = torch.zeros(_CHANNELS)
        if layer_norm or index == 0:
            weights |= _norm(layer + "layer_norm", _CHANNELS)
        channels = _CHANNELS
    weights |= _norm("feature_projection.layer_norm", _CHANNELS)
    weights |= _linear("feature_projection.projection", _CHANNELS, width, normal, gain=1)
    # published with weight norm under its old names: direction v and, per tap, length g
    convolution = "encoder.pos_conv_embed.conv."
    weights[convolution + "weight_v"] = normal(width, width // _GROUPS, _POSITIONS, scale=1)
    weights[convolution + "weight_g"] = torch.full((1, 1, _POSITIONS), math.sqrt(2 * width / _POSITIONS))
    weights[convolution + "bias"] = torch.zeros(width)
    weights |= _norm("encoder.layer_norm", width)
    for index in range(_HUBERT_LAYERS):
        layer = f"encoder.layers.{index}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights |= _linear(f"{layer}attention.{projection}", width, width, normal, gain=0.3)
        weights |= _linear(layer + "feed_forward.intermediate_dense", width, inner, normal, gain=0.3)
        weights |= _linear(layer + "feed_forward.output_dense", inner, width, normal, gain=0.3)
        weights |= _norm(layer + "layer_norm", width) | _norm(layer + "final_layer_norm", width)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _linear(name: str, inputs: int, outputs: int, normal: _Normal, gain: float) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": normal(outputs, inputs, scale=gain / math.sqrt(inputs)),
        f"{name}.bias": torch.zeros(outputs),
    }


def _norm(name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _train_tokenizer(sentences: list[str]) -> bytes:
    """A sentencepiece model, serialised, with bytes for what it has not seen; from memory, so no path gets into it."""
    import sentencepiece

    characters = set("".join(sentences)) | set(_PUNCTUATION)
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences, _PUNCTUATION]),
        model_writer=output,
        model_type="unigram",
        vocab_size=3 + 256 + len(_WORDS) + len(characters) + 64,  # specials, bytes, words, characters, pieces
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentencepiece_length=4,
        byte_fallback=True,
        user_defined_symbols=_WORDS,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return output.getvalue()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
