"""Calibration error and temperature against hand-made cases, and the file that evaluate leaves for predict."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.engine.errors import PipelineError
from stages.evaluation import calibration
from stages.evaluation.calibration import BINS, BOUNDS, calibration_error, fit_temperature, tempered


def draw(surer: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities from which the classes were really drawn, then made surer (or less sure) by scaling the logits."""
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(2 * generator.normal(size=(4000, 5)))
    actual = np.array([generator.choice(5, p=row) for row in logits.softmax(-1).numpy()])
    return (logits * surer).softmax(-1).float().numpy(), actual


def test_error_by_hand() -> None:
    sure, unsure = [0.95, 0.05], [0.3, 0.7]  # of three clips called with 95 % two are right, of two with 70 % both
    probabilities, actual = np.array([sure, sure, sure, unsure, unsure]), np.array([0, 0, 1, 1, 1])
    assert calibration_error(probabilities, actual) == pytest.approx(3 / 5 * (95 - 200 / 3) + 2 / 5 * 30)
    table = calibration.reliability(probabilities, actual)
    assert table["clips"].tolist() == [2, 3] and table["bin"].tolist() == [int(0.7 * BINS), BINS - 1]
    assert calibration_error(np.eye(2)[actual], actual) == 0  # a probability of 1 has a bin too


@pytest.mark.parametrize("surer", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_made_the_models_too_sure(surer: float) -> None:
    probabilities, actual = draw(surer)
    fitted = fit_temperature(probabilities, actual)
    assert fitted == pytest.approx(surer, rel=0.05)
    after = calibration_error(tempered(probabilities, fitted), actual)
    assert after < 3 and (surer == 1 or after < calibration_error(probabilities, actual) / 2)


def test_no_label_changes_and_a_softmax_of_zero_is_no_fault() -> None:
    probabilities, actual = draw(1.0)
    logits = torch.from_numpy(probabilities).double().log()
    torch.testing.assert_close(torch.from_numpy(tempered(probabilities, 2.5)), (logits / 2.5).softmax(-1))
    probabilities[0] = np.eye(5)[2]
    for temperature in BOUNDS:
        changed = tempered(probabilities, temperature)
        assert np.isfinite(changed).all() and changed.sum(-1) == pytest.approx(np.ones(len(changed)))
        assert (changed.argmax(-1) == probabilities.argmax(-1)).all()
    assert tempered(probabilities, 1.0) is probabilities
    right = np.where(np.arange(5) == actual[:, None], 0.6, 0.1)
    assert fit_temperature(right, actual) == BOUNDS[0]  # never wrong: as sure as may be


@pytest.mark.parametrize(("content", "expected"), [
    (None, "not found; the probabilities' temperature is made by: dvc repro evaluate"),
    ("{", "can't be read"),
    ('{"ensemble": "a"}', "can't be read"),
    ('{"temperature": 2, "ensemble": "b"}', "made for other models than those that are there now"),
    ('{"temperature": 0, "ensemble": "a"}', "temperature: found 0.0, expected 0.1 to 10.0"),
    ('{"temperature": NaN, "ensemble": "a"}', "temperature: found nan"),
])
def test_a_temperature_that_can_not_be_used_is_one_line(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "calibration.json"
    if content:
        path.write_text(content)
    with pytest.raises(PipelineError, match=expected):
        calibration.read_temperature(path, "a")
    path.write_text(json.dumps({"temperature": 2, "ensemble": "a"}))
    assert calibration.read_temperature(path, "a") == 2
