"""Our Baichuan decoder against the official 13B code (README.txt in the golden folder says how)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.encoders.baichuan import load_decoder

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
CASES = sorted(case.parent for case in GOLDEN.glob("baichuan/*/config.json"))
LAST_FOUR = [-4, -3, -2, -1]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_golden_folder_has_cases() -> None:
    assert CASES, f"no baichuan case under {GOLDEN}"


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_every_hidden_state(folder: Path) -> None:
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


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_the_sum_of_the_last_four_in_one_padded_batch(folder: Path) -> None:
    case = load_file(folder / "case.safetensors")
    decoder = load_decoder(folder, str(folder), "float32", "cpu", LAST_FOUR)
    ids = [case[f"input_ids.{i}"] for i in range(sum(name.startswith("input_ids.") for name in case))]
    features = decoder(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True))
    for i, tokens in enumerate(ids):
        assert relative(features[i, : len(tokens)], case[f"hidden_states.{i}"][-4:].sum(0)) < 1e-4
