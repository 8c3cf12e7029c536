"""The fusion gives the official baseline's logits from the baseline's weights (tests/golden/README.txt, attention)."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.fusion.model import Architecture, first_layer, logits

CASES = sorted(Path(os.environ.get("GOLDEN_DIR", "tests/golden")).glob("attention/*/case.safetensors"))
NAMES = {"audio": "audios", "text": "texts", "video": "videos"}  # the baseline's encoders, in its order: its inputs


def test_there_are_cases():
    assert CASES


def baseline_layer(name: str) -> str:
    """Our Linear's name to the official baseline's."""
    other = {"scores": "fc_att", "classifier": "fc_out_1"}
    if name in other:
        return other[name]
    block, layer = name.removeprefix("encoders.").rsplit(".", 1)
    return f"attention_mlp.{layer}" if block == "attention" else f"{block}_encoder.{layer}"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_same_logits_as_the_baseline(path):
    case, weights = load_file(path), load_file(path.with_name("model.safetensors"))
    dimensions = tuple(case[key].shape[1] for key in NAMES.values())
    hidden, labels = weights["fc_att.weight"].shape[1], case["emos_out"].shape[1]
    architecture = Architecture(tuple(NAMES), dimensions, hidden, labels)
    flat = torch.full((2, architecture.size), torch.nan)  # two models: each must use its own numbers
    for name in architecture.layers:
        for kind in ("weight", "bias"):
            ours = architecture.views(flat)[f"{name}.{kind}"]
            ours[0], ours[1] = weights[f"{baseline_layer(name)}.{kind}"], 0
    parameters = architecture.views(flat)
    first = [first_layer(parameters, name, case[key].expand(2, -1, -1)) for name, key in NAMES.items()]
    ours, zero = logits(parameters, tuple(NAMES), first)
    expected = case["emos_out"]
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not zero.any()
