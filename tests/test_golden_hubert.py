"""HuBERT against transformers run one clip at a time (README.txt in the golden folder says how)."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from stages.encoders.hubert import Config, Encoder

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
CASES = sorted(case.parent for family in ("hubert", "hubert_base") for case in GOLDEN.glob(f"{family}/*/config.json"))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_golden_folder_has_cases() -> None:
    assert CASES, f"no hubert or hubert_base case under {GOLDEN}"


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
@pytest.mark.parametrize("folder", CASES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_features(folder: Path, batched: bool) -> None:
    case = load_file(folder / "case.safetensors")
    count = sum(name.startswith("waveform_") for name in case)
    assert count
    expected = "_final_ln" if "features_final_ln_0" in case else ""
    encoder = Encoder(
        Config(
            checkpoint=str(folder),
            revision=None,
            dtype="float32",
            layers=[-4, -3, -2, -1],
            resample=True,
            window_seconds=3600,
        ),
        "cpu",
    )
    if batched:  # as on a GPU
        encoder.batching = "padded" if encoder.maskable else "equal"
    waveforms = [encoder.normalize(case[f"waveform_{i}"]) for i in range(count)]
    for i, features in enumerate(encoder.encode(waveforms)):
        assert relative(features, case[f"features{expected}_{i}"]) < 1e-4
        assert relative(features.mean(0), case[f"mean{expected}_{i}"]) < 1e-4
