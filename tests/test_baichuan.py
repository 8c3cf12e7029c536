"""The text encoder: both Baichuan forms, other models, tokens, batching, loading, broken checkpoints."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stages.corpora.demo.checkpoints import make_baichuan
from stages.encoders import baichuan
from stages.encoders.baichuan import Config, Encoder, compose, load_decoder
from stages.engine.errors import PipelineError, Skip

LABELS = ["neutral", "anger", "happiness", "sadness", "worry", "surprise"]
SENTENCES = ["今天下午三点开会", "我把书放在桌子上了", "你昨天去哪里了", "窗户外面有一只猫", "太高兴了", "我很担心"]
TEXTS = ["猫", "今天下午三点开会，你昨天去哪里了？", "太高兴了！", "我很担心窗户外面的猫" * 12, "abc 龘"]


@pytest.fixture(scope="module")
def alibi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("baichuan") / "13b"
    make_baichuan(folder, 1, [*SENTENCES, compose("", LABELS)])
    return folder


@pytest.fixture(scope="module")
def rotary(alibi: Path) -> Path:
    """The same weights under a 7B's config."""
    folder = shutil.copytree(alibi, alibi.parent / "7b")
    config = json.loads((folder / "config.json").read_text())
    del config["model_max_length"]
    config |= {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def copy(alibi: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own for a test to change."""
    return shutil.copytree(alibi, tmp_path / "copy")


def encoder(folder: Path | str, **changes: Any) -> Encoder:
    values: dict[str, Any] = {
        "checkpoint": str(folder),
        "revision": None,
        "dtype": "float32",
        "layers": [-4, -3, -2, -1],
        "max_tokens": 512,
    }
    return Encoder(Config(**values | changes), "cpu")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# --- what it computes (the 13B form against the official code: test_golden_baichuan.py) ---


def test_rotary_form_is_llama_with_its_projections_packed(rotary: Path) -> None:
    """transformers' Llama, given W_pack's thirds, is an independent 7B."""
    from transformers import LlamaConfig, LlamaModel

    config = json.loads((rotary / "config.json").read_text())
    keys = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    ]
    llama = LlamaModel(LlamaConfig(**{key: config[key] for key in keys})).eval()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in load((rotary / "model.safetensors").read_bytes()).items():
        if name.endswith("W_pack.weight"):
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("W_pack", f"{letter}_proj")] = third
        else:
            weights[name] = tensor
    llama.load_state_dict({name.removeprefix("model."): t for name, t in weights.items() if name != "lm_head.weight"})
    ids = torch.arange(3, 103)[None]
    decoder = load_decoder(rotary, "7b", "float32", "cpu", [-1])
    assert decoder.rotary
    with torch.no_grad():
        expected = llama(ids, output_hidden_states=True).hidden_states
        for ours, theirs in zip(decoder.states(ids), expected, strict=True):
            assert relative(ours.numpy(), theirs.numpy()) < 1e-4


def test_the_form_is_told_by_the_published_configs(alibi: Path, rotary: Path, copy: Path) -> None:
    assert not load_decoder(alibi, "13b", "float32", "cpu", [1]).rotary
    # Baichuan2-7B's config has both keys
    change_config(copy, max_position_embeddings=4096)
    assert load_decoder(copy, "7b-2", "float32", "cpu", [1]).rotary


def test_alibi_slopes() -> None:
    assert baichuan._slopes(8) == [2.0**-i for i in range(1, 9)]
    assert baichuan._slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    forty = baichuan._slopes(40)  # the 13B's
    assert len(set(forty)) == 40 and forty[31] == 2.0**-8 and forty[32] == 2.0**-0.125


@pytest.mark.parametrize("form", ["alibi", "rotary"])
def test_batched_equals_single(form: str, request: pytest.FixtureRequest) -> None:
    model = encoder(request.getfixturevalue(form))
    model.chunk_tokens = 10**6  # as on a GPU
    prompts = [model.prepare(text) for text in TEXTS]
    together = model.encode(prompts)
    alone = encoder(request.getfixturevalue(form))
    for prompt, features in zip(prompts, together, strict=True):
        assert features.dtype == np.float32 and features.shape == (prompt.shape[1], model.dimension)
        assert relative(features, alone.encode([prompt])[0]) < 1e-4


def test_a_cpu_runs_chunks_of_cache_size(alibi: Path) -> None:
    model = encoder(alibi)
    prompts = [np.ones((2, length), dtype=np.int64) for length in (500, 20, 20, 480, 40)]
    assert [[p.shape[1] for p in chunk] for chunk in model._chunks(prompts)] == [[500], [20, 20], [480], [40]]
    assert [len(features) for features in model.encode(prompts)] == [500, 20, 20, 480, 40]


@pytest.mark.parametrize("layers", [[0], [2], [0, 4], [1, -1]])
def test_layers(alibi: Path, layers: list[int]) -> None:
    model = encoder(alibi, layers=layers)
    prompt = model.prepare(TEXTS[1])
    decoder = load_decoder(alibi, "13b", "float32", "cpu", [-1])
    states = torch.cat(list(decoder.states(torch.from_numpy(prompt[:1]))))
    assert relative(model.encode([prompt])[0], states[layers].sum(0).numpy()) < 1e-4


@pytest.mark.parametrize("form", ["alibi", "rotary"])
def test_half_precision_is_close(form: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(form)
    half, full = encoder(folder, dtype="bfloat16"), encoder(folder)
    prompt = full.prepare(TEXTS[1])
    assert relative(half.encode([prompt])[0], full.encode([prompt])[0]) < 2e-2


def _text_model(folder: Path, kind: str) -> None:
    """A miniature GPT-2 or BERT with its tokenizer, as published."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set("".join(SENTENCES)))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(pieces), initializer_range=0.3, **sizes)
    AutoModel.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_other_models_load_by_name(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    _text_model(tmp_path, kind)
    model = encoder(tmp_path, layers=[-2, -1])
    reference, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    prompts = [model.prepare(text) for text in (*SENTENCES, "我很担心窗户外面的猫" * 50)]
    assert prompts[-1].shape[1] == 64  # the model's own limit is below max_tokens
    for text, prompt, features in zip(SENTENCES, prompts, model.encode(prompts), strict=False):
        with torch.no_grad():
            states = reference(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        expected = (states[-2] + states[-1])[0].numpy()
        if kind == "bert":
            expected = expected[1:-1]  # [CLS] and [SEP]
        assert len(features) == len(text) and prompt[1].sum() == len(text)
        assert relative(features, expected) < 1e-4


# --- texts ---


def test_compose_puts_the_ranking_first() -> None:
    assert compose("太高兴了", ["happiness", "neutral"]) == "情感可能性从高到低：happiness、neutral。太高兴了"


def test_items(alibi: Path) -> None:
    model = encoder(alibi)
    plain = model.prepare("太高兴了")
    ranked = model.prepare({"transcript": "太高兴了", "ranking": LABELS, "model": "DUTIR"})
    assert plain.dtype == np.int64 and plain[1].all() and model.size(ranked) == ranked.shape[1]
    assert np.array_equal(ranked, model.prepare(compose("太高兴了", LABELS)))
    assert np.array_equal(ranked[0, -plain.shape[1] :], plain[0])


@pytest.mark.parametrize("item", ["", " \n", {"transcript": "", "ranking": LABELS}])
def test_no_transcript_is_skipped(alibi: Path, item: Any) -> None:
    with pytest.raises(Skip, match="no transcript"):
        encoder(alibi).prepare(item)


def test_one_token_and_five_thousand(alibi: Path) -> None:
    model = encoder(alibi)
    one, many = model.prepare("猫"), model.prepare("窗户外面有一只猫" * 5000)
    assert one.shape == (2, 1) and many.shape == (2, 512)
    features = model.encode([one, many])
    assert [len(f) for f in features] == [1, 512] and all(np.isfinite(f).all() for f in features)


def test_a_start_token_is_context_but_no_feature(copy: Path) -> None:
    without = encoder(copy)
    (copy / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    model = encoder(copy, max_tokens=4)
    prompt = model.prepare("太高兴了")
    assert prompt[0, 0] == 1 and prompt[1].tolist() == [0, 1, 1, 1][: prompt.shape[1]]
    features = model.encode([prompt])[0]
    assert len(features) == prompt.shape[1] - 1
    assert relative(features, without.encode([np.stack([prompt[0], np.ones_like(prompt[0])])])[0][1:]) < 1e-4


# --- configuration and loading (broken checkpoints: test_checkpoints.py) ---


@pytest.mark.parametrize("changes", [{"layers": [9]}, {"layers": [4, -1]}])
def test_layers_that_do_not_exist_or_repeat(alibi: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match="hidden state"):
        encoder(alibi, **changes)


@pytest.mark.parametrize("changes", [{"layers": []}, {"dtype": "int8"}, {"max_tokens": 0}, {"window_seconds": 30}])
def test_a_bad_config_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        encoder("anywhere", **changes)


def test_a_tokenizer_of_remote_code_is_refused(tmp_path: Path) -> None:
    _text_model(tmp_path, "gpt2")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "code.py").write_text("open('executed', 'w')")
    auto_map = {"AutoTokenizer": ["code.Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokenizer", "auto_map": auto_map}))
    with pytest.raises(PipelineError, match="no usable AutoTokenizer") as caught:
        encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_decoder_spread_over_devices_computes_the_same(alibi: Path) -> None:
    """accelerate's hooks, which transformers gives to the parts of a model on several GPUs, here all on the CPU."""
    from accelerate import dispatch_model

    decoder, ids = load_decoder(alibi, "13b", "float32", "cpu", [1, -1]), torch.arange(3, 60)[None]
    with torch.inference_mode():
        expected = decoder(ids)
        parts = dict.fromkeys(["embed_tokens", *(f"layers.{i}" for i in range(4)), "norm"], "cpu")
        dispatch_model(decoder, parts, force_hooks=True)
        assert hasattr(decoder.layers[2], "_hf_hook") and torch.equal(decoder(ids), expected)


def test_what_is_too_large_for_one_gpu_is_shared_out(alibi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers, in their order; the GPUs' free memory is made up."""
    decoder = torch.nn.ModuleDict({"model": load_decoder(alibi, "13b", "float32", "cpu", [-1])})
    size = sum(parameter.numel() * 4 for parameter in decoder.parameters())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def place(share: float) -> dict[str, str | int]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(share * size), 0))
        return baichuan._placement(decoder, "13b", torch.float32, "cuda:0")

    assert place(1.2) == {"": "cuda:0"}
    places = place(1.0)
    layers = [places[f"model.layers.{i}"] for i in range(4)]
    assert layers == sorted(layers) and set(places.values()) == {0, 1}
    with pytest.raises(PipelineError, match="13b: needs .* GiB in torch.float32, the GPUs have .* GiB free"):
        place(0.3)


# --- the demo's checkpoint ---


def test_demo_checkpoint_is_the_seed_s(tmp_path: Path) -> None:
    def digest(folder: Path, seed: int) -> str:
        make_baichuan(folder, seed, SENTENCES)
        return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()

    assert digest(tmp_path / "a", 5) == digest(tmp_path / "b", 5) != digest(tmp_path / "c", 6)


def test_demo_features_tell_rankings_apart(alibi: Path) -> None:
    """The most likely label of 60 ranked prompts that hold the same six labels: chance is 0.17."""
    model = encoder(alibi)
    random = np.random.default_rng(0)
    tops = np.arange(60) % 6
    prompts = []
    for top in tops:
        others = random.permutation([label for label in LABELS if label != LABELS[top]]).tolist()
        prompts.append(model.prepare({"transcript": str(random.choice(SENTENCES)), "ranking": [LABELS[top], *others]}))
    pooled = np.array([np.concatenate([f.mean(0), f.var(0)]) for f in model.encode(prompts)])
    probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=10))
    assert cross_val_score(probe, pooled, tops, cv=5).mean() > 0.7
