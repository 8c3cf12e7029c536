"""A Qwen2.5-Omni thinker of two small layers in each part with random weights, as a published folder."""

from pathlib import Path
from typing import Any

TOKENS = {
    "image": "<|IMAGE|>", "audio": "<|AUDIO|>", "video": "<|VIDEO|>", "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>", "audio_bos": "<|audio_bos|>", "audio_eos": "<|audio_eos|>",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{% if c.type == 'image' %}<|vision_bos|><|IMAGE|>"
    "<|vision_eos|>{% elif c.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def save_omni(folder: Path, nested: bool = False) -> None:
    """Save processor and weights. `nested`: as the thinker of a whole Qwen2.5-Omni, whose talker is left out."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", *TOKENS.values()], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(["neutral anger happiness the emotions of the speaker"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>",
        extra_special_tokens={f"{name}_token": token for name, token in TOKENS.items()},
    )  # fmt: skip
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        feature_extractor=WhisperFeatureExtractor(feature_size=16, chunk_length=4, return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0},
    }  # fmt: skip
    config = Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
            "window_size": 56, "fullatt_block_indexes": [1],
        },  # fmt: skip
        audio_config={
            "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32,
            "output_dim": 32, "max_source_positions": 200, "n_window": 50,
        },  # fmt: skip
        audio_token_index=ids(TOKENS["audio"]), image_token_index=ids(TOKENS["image"]),
        video_token_index=ids(TOKENS["video"]), audio_start_token_id=ids(TOKENS["audio_bos"]),
        audio_end_token_id=ids(TOKENS["audio_eos"]), vision_start_token_id=ids(TOKENS["vision_bos"]),
        vision_end_token_id=ids(TOKENS["vision_eos"]),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    if nested:
        import json

        path = folder / "config.json"
        whole = {"model_type": "qwen2_5_omni", "thinker_config": json.loads(path.read_text())}
        path.write_text(json.dumps(whole))
        weights = {f"thinker.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
