"""Checkpoints of the published sizes and file layouts with random weights, for benchmarks: nothing is downloaded."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from stages.commands.published import DecoderSize, decoder_config, hubert_config
from stages.engine.files import write_json, write_tensors
from stages.engine.fingerprint import checkpoint_digest

ALPHABET = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]  # a token each


SMALL_DECODER = DecoderSize(6, 256, 4, 688)
WIDER_DECODER = DecoderSize(8, 512, 8, 1376)


def make_hubert(folder: Path, large: bool) -> Path:
    from transformers import HubertModel, Wav2Vec2FeatureExtractor

    HubertModel(hubert_config(large)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=large).save_pretrained(folder)
    return folder


def make_clip(folder: Path, name: str) -> Path:
    """One of open_clip's models by its name."""
    import open_clip
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.model import CLIP

    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip has no model {name}")
    preprocess = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic",
                  "resize_mode": "shortest"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    tensors = {name: tensor.contiguous() for name, tensor in CLIP(**config).state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return folder


def make_prompts(folder: Path, checkpoint: Path) -> Path:
    """EmoVCLIP's prompts for the checkpoint as one fold, four per layer over twelve layers, untrained."""
    from open_clip import get_tokenizer

    from stages.encoders.emovclip import TRAINED, initial_prompts, label_tokens, load_promptable

    model, name = load_promptable(str(checkpoint), None, "float32", "cpu")
    tokens = label_tokens(get_tokenizer(name), "a photo of a person feeling {label}.", ["joy", "anger"], 4)
    prompts = initial_prompts(model, tokens, 4, 12, 0)
    write_tensors(folder / "fold-0.safetensors", dict(prompts.named_parameters()))
    digest = checkpoint_digest(str(checkpoint)).hex()
    write_json(folder / TRAINED, {"revision": None, "digest": digest, "scope": "fold", "folds": 1})
    return folder


def make_decoder(folder: Path, size: DecoderSize, dtype: torch.dtype, device: str) -> Path:
    """A Baichuan folder: config.json, a safetensors file per layer with their index, tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_tokenizer(ALPHABET))
    (folder / "config.json").write_text(json.dumps(decoder_config(size)))

    def normal(outputs: int, inputs: int) -> torch.Tensor:
        return (torch.randn(outputs, inputs, device=device) / math.sqrt(inputs)).to("cpu", dtype)

    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))

    width, ones = size.width, torch.ones(size.width, dtype=dtype)
    save("model-rest.safetensors", {"model.embed_tokens.weight": normal(size.vocabulary, width),
                                    "model.norm.weight": ones})
    for index in range(size.layers):
        layer = f"model.layers.{index}."
        save(f"model-{index:02d}.safetensors", {
            layer + "input_layernorm.weight": ones,
            layer + "self_attn.W_pack.weight": normal(3 * width, width),
            layer + "self_attn.o_proj.weight": normal(width, width),
            layer + "post_attention_layernorm.weight": ones.clone(),
            layer + "mlp.gate_proj.weight": normal(size.inner, width),
            layer + "mlp.up_proj.weight": normal(size.inner, width),
            layer + "mlp.down_proj.weight": normal(width, size.inner),
        })
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _tokenizer(alphabet: Sequence[str]) -> bytes:
    """A sentencepiece model with a token for each character."""
    import sentencepiece

    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(alphabet), model_writer=output, model_type="char", hard_vocab_limit=False,
        vocab_size=len(alphabet) + 3, character_coverage=1.0, normalization_rule_name="identity",
        add_dummy_prefix=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )
    return output.getvalue()
