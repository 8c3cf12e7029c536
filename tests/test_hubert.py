"""The HuBERT encoder: batching, windows, odd audio, other families, broken checkpoints."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save_file
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stages.corpora.demo.checkpoints import make_hubert, make_hubert_base
from stages.encoders.hubert import Config, Encoder
from stages.engine.errors import PipelineError, Skip

RATE = 16000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("hubert")
    make_hubert(root / "layer", seed=1)
    make_hubert_base(root / "group", seed=1)
    return {"layer": root / "layer", "group": root / "group"}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint of its own for a test to break."""
    return shutil.copytree(folders["layer"], tmp_path / "broken")


def encoder(folder: Path | str, **changes: Any) -> Encoder:
    values: dict[str, Any] = {
        "checkpoint": str(folder),
        "revision": None,
        "dtype": "float32",
        "layers": [-4, -3, -2, -1],
        "resample": True,
        "window_seconds": 30,
    }
    return Encoder(Config(**values | changes), "cpu")


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    samples = np.random.default_rng(seed).normal(0, 3000, round(seconds * rate)).cumsum()
    return np.clip(samples - samples.mean(), -30000, 30000).astype(np.int16)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# --- what it computes ---


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_batched_equals_single(folders: dict[str, Path], norm: str) -> None:
    model = encoder(folders[norm])
    model.batching = "padded" if norm == "layer" else "equal"  # as on a GPU
    clips = [model.prepare((noise(seconds, i), RATE)) for i, seconds in enumerate([4.0, 0.03, 0.9, 2.5, 0.9])]
    together = model.encode(clips)
    for clip, features in zip(clips, together, strict=True):
        assert features.dtype == np.float32 and features.shape[1] == model.dimension == 64
        assert relative(features, model.encode([clip])[0]) < 1e-4


def test_only_layer_norm_models_may_be_padded(folders: dict[str, Path]) -> None:
    layer, group = encoder(folders["layer"]), encoder(folders["group"])
    assert layer.maskable and not group.maskable
    group.batching = "equal"
    assert sorted(group._groups([500, 700, 500, 900])) == [[0, 2], [1], [3]]


@pytest.mark.parametrize("layers", [[0], [2], [0, 4], [1, -1], [-3, -2]])
def test_layers_are_the_states_that_transformers_returns(folders: dict[str, Path], layers: list[int]) -> None:
    from transformers import HubertModel

    model = encoder(folders["layer"], layers=layers)
    clip = model.prepare((noise(0.7), RATE))
    reference = HubertModel.from_pretrained(folders["layer"], attn_implementation="eager").eval()
    with torch.no_grad():
        output = reference(torch.from_numpy(clip)[None], output_hidden_states=True)
    states = [*output.hidden_states[:-1], output.last_hidden_state]  # after the final norm
    assert relative(model.encode([clip])[0], sum(states[i] for i in layers)[0].numpy()) < 1e-4


def test_training_noise_has_no_effect(folders: dict[str, Path], copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"layerdrop": 0.9, "mask_time_prob": 0.9, "hidden_dropout": 0.9, "attention_dropout": 0.9}
    (copy / "config.json").write_text(json.dumps(config))
    plain, noisy = encoder(folders["layer"]), encoder(copy)
    clip = plain.prepare((noise(0.5), RATE))
    assert np.array_equal(plain.encode([clip])[0], noisy.encode([clip])[0])


def test_half_precision_is_close(folders: dict[str, Path]) -> None:
    model = encoder(folders["layer"])
    clip = model.prepare((noise(2.0), RATE))
    half = encoder(folders["layer"], dtype="bfloat16").encode([clip])[0]
    assert half.dtype == np.float32
    assert relative(half, model.encode([clip])[0]) < 2e-2


@pytest.mark.parametrize("family", ["wav2vec2-layer", "wav2vec2-group", "wavlm-layer", "data2vec-audio"])
def test_other_families_load_by_name(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoModel

    kind, _, norm = family.partition("-") if family.startswith("wav") else (family, "", "layer")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    if kind != "data2vec-audio":
        sizes |= {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer", "initializer_range": 0.2}
    torch.manual_seed(0)
    published = AutoModel.from_config(AutoConfig.for_model(kind, conv_dim=[16] * 7, **sizes)).eval()
    published.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": RATE}))
    model = encoder(tmp_path, layers=[-2, -1])
    assert model.maskable == (family in ("wav2vec2-layer", "wavlm-layer"))
    model.batching = "padded" if model.maskable else "equal"
    clips = [model.prepare((noise(seconds), RATE)) for seconds in (1.0, 0.3, 0.31)]
    for clip, features in zip(clips, model.encode(clips), strict=True):
        with torch.no_grad():
            output = published(torch.from_numpy(clip)[None], output_hidden_states=True)
        expected = output.hidden_states[-2] + output.last_hidden_state
        assert relative(features, expected[0].numpy()) < 1e-4


# --- audio ---


def test_normalisation_is_over_the_whole_clip(folders: dict[str, Path]) -> None:
    prepared = encoder(folders["layer"]).prepare((noise(1.0) + 50, RATE))
    assert prepared.dtype == np.float32 and abs(prepared.mean()) < 1e-5 and abs(prepared.std() - 1) < 1e-3


def test_a_checkpoint_may_want_raw_samples(copy: Path) -> None:
    (copy / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "sampling_rate": RATE}))
    samples = noise(0.1)
    assert np.array_equal(encoder(copy).prepare((samples, RATE)), samples.astype(np.float32) / 32768)


@pytest.mark.parametrize("rate", [8000, 24000, 44100])
def test_resampling(folders: dict[str, Path], rate: int) -> None:
    def tone(sample_rate: int) -> np.ndarray:
        return (9000 * np.sin(2 * np.pi * 440 * np.arange(2 * sample_rate) / sample_rate)).astype(np.int16)

    resampling = encoder(folders["layer"])
    expected = resampling.prepare((tone(RATE), RATE))
    prepared = resampling.prepare((tone(rate), rate))
    assert abs(len(prepared) - len(expected)) <= 1
    assert np.abs(prepared[2000:-2000] - expected[2000 : len(prepared) - 2000]).max() < 0.02
    as_it_is = encoder(folders["layer"], resample=False).prepare((tone(rate), rate))
    assert len(as_it_is) == 2 * rate


def test_long_clips_are_encoded_in_windows(folders: dict[str, Path]) -> None:
    model = encoder(folders["layer"], window_seconds=2)
    short, long = model.prepare((noise(1.0), RATE)), model.prepare((noise(5.003), RATE))
    windows = model._windows(long)
    assert len(windows) == 3 and np.array_equal(np.concatenate(windows), long)
    assert all(len(window) % 320 == 0 for window in windows[:-1])
    assert max(map(len, windows)) - min(map(len, windows)) <= 640
    features = model.encode([long, short, long])
    expected = np.concatenate(model.encode(windows))
    assert relative(features[0], expected) < 1e-4 and np.array_equal(features[0], features[2])
    assert relative(features[1], model.encode([short])[0]) < 1e-4


def test_five_minutes(folders: dict[str, Path]) -> None:
    model = encoder(folders["group"])
    features = model.encode([model.prepare((noise(300), RATE))])[0]
    assert 14980 <= len(features) <= 15000 and np.isfinite(features).all()


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("level", [0, 7], ids=["silence", "offset"])
def test_silence_gives_finite_features(folders: dict[str, Path], norm: str, level: int) -> None:
    model = encoder(folders[norm])
    features = model.encode([model.prepare((np.full(RATE, level, dtype=np.int16), RATE))])[0]
    assert features.shape == (49, 64) and np.isfinite(features).all()


@pytest.mark.parametrize("samples", [0, 1, 240, 599])
def test_audio_shorter_than_one_frame_is_skipped(folders: dict[str, Path], samples: int) -> None:
    with pytest.raises(Skip, match=f"{samples} samples"):
        encoder(folders["layer"]).prepare((noise(1, rate=24000)[:samples], 24000))


def test_one_frame(folders: dict[str, Path]) -> None:
    model = encoder(folders["layer"])
    assert model.encode([model.prepare((noise(1)[:400], RATE))])[0].shape == (1, 64)


# --- checkpoints ---


def test_published_bin_with_old_names_equals_safetensors(folders: dict[str, Path], copy: Path) -> None:
    """chinese-hubert-large is a pytorch_model.bin whose weight norm is weight_g and weight_v."""
    weights = load((copy / "model.safetensors").read_bytes())
    assert "encoder.pos_conv_embed.conv.weight_g" in weights
    del weights["masked_spec_embed"]  # unused at inference: conversions from fairseq lack it
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    model = encoder(copy)
    clip = model.prepare((noise(0.5), RATE))
    assert np.array_equal(model.encode([clip])[0], encoder(folders["layer"]).encode([clip])[0])


def _drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["encoder.layers.2.attention.k_proj.weight"]


def _shrink(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.layers.2.attention.k_proj.weight"] = torch.zeros(64, 32)


@pytest.mark.parametrize(("change", "words"), [(_drop, "is missing"), (_shrink, r"shape \(64, 32\).*\(64, 64\)")])
def test_a_bad_tensor_is_named(copy: Path, change: Callable[[dict[str, torch.Tensor]], None], words: str) -> None:
    weights = load((copy / "model.safetensors").read_bytes())
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match=f"broken: tensor encoder.layers.2.attention.k_proj.*{words}") as caught:
        encoder(copy)
    assert "\n" not in str(caught.value)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("executed", "w"))


def test_a_pickle_with_code_is_refused(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (copy / "model.safetensors").unlink()
    torch.save({"masked_spec_embed": _Payload()}, copy / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(PipelineError, match="checkpoint .*broken: pytorch_model.bin can't be loaded") as caught:
        encoder(copy)
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()


def test_other_broken_checkpoints_are_one_line(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="nowhere: no such folder"):
        encoder(tmp_path / "nowhere")
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(PipelineError, match="broken: model.safetensors can't be loaded"):
        encoder(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(PipelineError, match="model_type 'bert' is none of"):
        encoder(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(PipelineError, match="config.json can't be read"):
        encoder(copy)
    (copy / "config.json").unlink()
    with pytest.raises(PipelineError, match="config.json is missing"):
        encoder(copy)


def test_a_hub_name_is_taken_from_the_cache_at_its_revision(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--chinese-hubert" / "snapshots" / revision
    shutil.copytree(folders["layer"], snapshot)
    assert encoder("someone/chinese-hubert", revision=revision).dimension == 64
    with pytest.raises(PipelineError, match="someone/other: no such folder, and the hub does not give it") as caught:
        encoder("someone/other", revision=revision)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [[5], [-6], [0, 0], [4, -1]])
def test_layers_that_do_not_exist_or_repeat(folders: dict[str, Path], layers: list[int]) -> None:
    with pytest.raises(PipelineError, match="hidden state"):
        encoder(folders["layer"], layers=layers)


@pytest.mark.parametrize(
    "changes", [{"layers": []}, {"dtype": "int8"}, {"window_seconds": 0}, {"resample": "yes"}, {"depth": 3}]
)
def test_a_bad_config_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        encoder("anywhere", **changes)


# --- the demo's checkpoints ---


@pytest.mark.parametrize("make", [make_hubert, make_hubert_base])
def test_demo_checkpoints_are_the_seed_s(tmp_path: Path, make: Callable[[Path, int], None]) -> None:
    def digest(folder: Path, seed: int) -> str:
        make(folder, seed)
        return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()

    assert digest(tmp_path / "a", 5) == digest(tmp_path / "b", 5) != digest(tmp_path / "c", 6)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_demo_features_tell_pitches_apart(folders: dict[str, Path], norm: str) -> None:
    """Six pitches a quarter apart, in noise, 60 clips: chance is 0.17."""
    model = encoder(folders[norm])
    random = np.random.default_rng(0)
    time = np.arange(RATE // 2) / RATE
    labels = np.arange(60) % 6
    pooled = []
    for label in labels:
        pitch = 120 * 1.25**label * np.exp(random.normal(0, 0.02))
        voice = sum(np.sin(2 * np.pi * pitch * k * time + random.uniform(0, 6)) / k for k in range(1, 6))
        samples = (4000 * (voice + random.normal(0, 0.05, len(time)))).astype(np.int16)
        features = model.encode([model.prepare((samples, RATE))])[0]
        pooled.append(np.concatenate([features.mean(0), features.var(0)]))
    probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=10))
    assert cross_val_score(probe, np.array(pooled), labels, cv=5).mean() > 0.7
