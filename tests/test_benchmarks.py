"""The benchmarks start and finish with today's code and preset, at a size that takes a second."""

import re

import pytest

from benchmarks import fusion

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "DIMENSIONS", dict.fromkeys(fusion.DIMENSIONS, 8))
    monkeypatch.setattr(fusion, "LABELLED", 640)
    monkeypatch.setattr(fusion, "UNLABELLED", 200)


def test_self_training_is_timed(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    p = fusion.paper(epochs=2, seeds=[0])
    fusion.whole(p.fusion, p.self_training.model_copy(update={"rounds": 1}), "cpu")
    told = capsys.readouterr().out
    assert "1 seeds x 5 folds x 2 epochs, 200 unlabelled: round 0" in told and "self-training (1 rounds)" in told


def test_the_fusion_is_timed_beside_the_baselines_loop(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    fusion.beside_the_baseline(fusion.paper(epochs=5, seeds=[0]).fusion, "cpu")
    assert re.search(r"^ratio \d", capsys.readouterr().out, re.MULTILINE)
