"""Every encoder and the fusion against what independent implementations computed from the same weights.

The cases lie in the folder that GOLDEN_DIR names, by default tests/golden; its README.txt says who made them and the
conventions. Every size is taken from the files, so further cases of the same layout can be run.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.encoders import hubert
from stages.encoders.baichuan import load_decoder
from stages.encoders.emovclip import PromptedCLIP, Prompts, video_features
from stages.fusion.architectures import Architecture

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FAMILIES = ("attention", "baichuan", "emovclip", "hubert", "hubert_base")
CASES = {family: sorted(path.parent for path in GOLDEN.glob(f"{family}/*/case.safetensors")) for family in FAMILIES}
LAST_FOUR = [-4, -3, -2, -1]
MODALITIES = {"audio": "audios", "text": "texts", "video": "videos"}  # the baseline's order, and its inputs


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def cases(*families: str) -> pytest.MarkDecorator:
    found = [folder for family in families for folder in CASES[family]]
    return pytest.mark.parametrize("folder", found, ids=lambda folder: f"{folder.parent.name}-{folder.name}")


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_cases(family: str) -> None:
    assert CASES[family], f"no {family} case under {GOLDEN}"


# ---------------------------------------------------------------- hubert


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
@cases("hubert", "hubert_base")
def test_hubert_features(folder: Path, batched: bool) -> None:
    case = load_file(folder / "case.safetensors")
    count = sum(name.startswith("waveform_") for name in case)
    assert count
    expected = "_final_ln" if "features_final_ln_0" in case else ""
    config = hubert.Config(checkpoint=str(folder), revision=None, dtype="float32", layers=LAST_FOUR, resample=True,
                           window_seconds=3600)
    encoder = hubert.Encoder(config, "cpu")
    if batched:  # as on a GPU
        encoder.batching = "padded" if encoder.maskable else "equal"
    waveforms = [encoder.normalize(case[f"waveform_{i}"].numpy()) for i in range(count)]
    for i, features in enumerate(map(torch.from_numpy, encoder.encode(waveforms))):
        assert relative(features, case[f"features{expected}_{i}"]) < 1e-4
        assert relative(features.mean(0), case[f"mean{expected}_{i}"]) < 1e-4


# ---------------------------------------------------------------- baichuan


@cases("baichuan")
def test_baichuan_every_hidden_state(folder: Path) -> None:
    case = load_file(folder / "case.safetensors")
    decoder = load_decoder(folder, str(folder), "float32", "cpu", LAST_FOUR)
    count = sum(name.startswith("input_ids.") for name in case)
    assert count
    for i in range(count):
        expected = case[f"hidden_states.{i}"]
        states = [state[0] for state in decoder.states(case[f"input_ids.{i}"][None])]
        assert len(states) == len(expected) == json.loads((folder / "config.json").read_text())["num_hidden_layers"] + 1
        for state, golden in zip(states, expected, strict=True):
            assert relative(state, golden) < 1e-4


@cases("baichuan")
def test_baichuan_sum_of_the_last_four_in_one_padded_batch(folder: Path) -> None:
    case = load_file(folder / "case.safetensors")
    decoder = load_decoder(folder, str(folder), "float32", "cpu", LAST_FOUR)
    ids = [case[f"input_ids.{i}"] for i in range(sum(name.startswith("input_ids.") for name in case))]
    features = decoder(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True))
    for i, tokens in enumerate(ids):
        assert relative(features[i, : len(tokens)], case[f"hidden_states.{i}"][-4:].sum(0)) < 1e-4


# ---------------------------------------------------------------- emovclip


def prompted(folder: Path, case: dict[str, torch.Tensor]) -> PromptedCLIP:
    from open_clip.model import CLIP

    model = CLIP(**json.loads((folder / "open_clip_config.json").read_text())).eval().requires_grad_(False)
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"attn_mask"}
    return PromptedCLIP(model, Prompts(case["vision_prompts"], case["text_prompts"]))


@cases("emovclip")
def test_emovclip_features_and_logits(folder: Path) -> None:
    case = load_file(folder / "case.safetensors")
    clip = prompted(folder, case)
    batch, count = case["frames"].shape[:2]
    with torch.inference_mode():
        frames = clip.frame_features(case["frames"].flatten(0, 1)).unflatten(0, (batch, count))
        video, text = video_features(frames), clip.text_features(case["token_ids"])
        assert relative(frames, case["frame_features"]) < 1e-4
        assert relative(video, case["video_features"]) < 1e-4
        assert relative(text, case["text_features"]) < 1e-4
        assert relative(clip.logits(video, text), case["logits"]) < 1e-4


@cases("emovclip")
def test_emovclip_would_notice_prompts_that_are_left_out(folder: Path) -> None:
    case = load_file(folder / "case.safetensors")
    clip = prompted(folder, {n: t[:, :0] if n.endswith("_prompts") else t for n, t in case.items()})
    with torch.inference_mode():
        assert relative(clip.frame_features(case["frames"].flatten(0, 1)),
                        case["frame_features"].flatten(0, 1)) > 1e-2


# ---------------------------------------------------------------- attention


def baseline_name(name: str) -> str:
    """Our weight's name to the official baseline's."""
    layer, kind = name.rsplit(".", 1)
    other = {"scores": "fc_att", "classifier": "fc_out_1"}
    if layer in other:
        return f"{other[layer]}.{kind}"
    block, part = layer.rsplit(".", 1)
    encoder = "attention_mlp" if block == "attention" else f"{list(MODALITIES)[int(block.split('.')[1])]}_encoder"
    return f"{encoder}.{part}.{kind}"


@cases("attention")
def test_attention_same_logits_as_the_baseline(folder: Path) -> None:
    case, weights = load_file(folder / "case.safetensors"), load_file(folder / "model.safetensors")
    features = [case[key] for key in MODALITIES.values()]
    expected = case["emos_out"]
    hidden, labels = weights["fc_att.weight"].shape[1], expected.shape[1]
    dimensions = tuple(x.shape[1] for x in features)
    model = Architecture("attention", tuple(MODALITIES), dimensions, labels, hidden, 0.3, 0.3, True).build().eval()
    model.load_state_dict({name: weights[baseline_name(name)] for name in model.state_dict()})
    logits, scores = model(features, torch.ones(len(expected), len(features), dtype=torch.bool))
    assert relative(logits, expected) <= 1e-4
    assert scores.shape == (len(expected), len(features))
