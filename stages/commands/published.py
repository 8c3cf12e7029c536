"""Shapes of the published models, without their weights: what `mer estimate` counts and benchmarks fill at random."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import HubertConfig

LAYERS = [-4, -3, -2, -1]  # hidden states that are summed, as in the paper


@dataclass(frozen=True)
class DecoderSize:
    """Of a Baichuan-like decoder, with ALiBi or rotary positions."""

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int = 64000
    rotary: bool = False


BAICHUAN_13B = DecoderSize(40, 5120, 40, 13696)
BAICHUAN_7B = DecoderSize(32, 4096, 32, 11008, rotary=True)


def hubert_config(large: bool) -> "HubertConfig":
    """Of HuBERT-large (layer norm, as chinese-hubert-large) or -base (group norm)."""
    from transformers import HubertConfig

    return HubertConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
    ) if large else HubertConfig()


def decoder_config(size: DecoderSize) -> dict[str, Any]:
    """config.json as Baichuan's: max_position_embeddings with rotary positions, else model_max_length."""
    return {
        "model_type": "baichuan", "vocab_size": size.vocabulary, "hidden_size": size.width,
        "intermediate_size": size.inner, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "max_position_embeddings" if size.rotary else "model_max_length": 4096, "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
