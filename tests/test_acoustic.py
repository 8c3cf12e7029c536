"""The encoder without weights: what its features measure, silence, short and long clips, threads, real speech."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from trained_run import write_details

from stages.encoders.acoustic import HOP, PIECE, RATE, Config, Encoder
from stages.encoders.pooling import pooled_row
from stages.engine.errors import Skip
from stages.engine.params import load
from stages.inference.card import render_card
from stages.inference.trained import Trained
from stages.media.audio import load_audio

EMODB = Path("/work/shared/real/emodb")
F0, RMS, CENTROID, BANDWIDTH, ROLLOFF, FLATNESS, CROSSINGS = range(60, 67)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(Config(mels=40, mfcc=20), "cpu")


def tone(frequency: float, seconds: float, rate: int = RATE, amplitude: float = 8000) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.int16)


def hiss(seconds: float, amplitude: float = 3000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, amplitude, int(seconds * RATE)).astype(np.int16)


def inner(encoder: Encoder, samples: np.ndarray, rate: int = RATE) -> np.ndarray:
    """Mean over time, without the frames at the edges."""
    return encoder.prepare((samples, rate))[4:-4].mean(axis=0)


@pytest.mark.parametrize(("frequency", "rate"), [(110.0, 16000), (220.0, 24000), (440.0, 44100)])
def test_a_tone(encoder: Encoder, frequency: float, rate: int) -> None:
    features = encoder.prepare((tone(frequency, 1.0, rate), rate))
    assert features.shape == (1 + RATE // HOP, encoder.dimension) == (51, 67) and features.dtype == np.float32
    found = inner(encoder, tone(frequency, 1.0, rate), rate)
    assert 2 ** found[F0] == pytest.approx(frequency, rel=0.02)
    assert found[CENTROID] == pytest.approx(frequency, rel=0.1)
    assert np.exp(found[RMS]) == pytest.approx(8000 / 32768 / np.sqrt(2), rel=0.02)
    assert found[CROSSINGS] == pytest.approx(2 * frequency / RATE, rel=0.1)


def test_a_hiss_is_flatter_wider_and_brighter_than_a_tone(encoder: Encoder) -> None:
    noisy, clear = inner(encoder, hiss(1.0)), inner(encoder, tone(200, 1.0))
    for measure in (CENTROID, BANDWIDTH, ROLLOFF, FLATNESS, CROSSINGS):
        assert noisy[measure] > clear[measure]
    louder = inner(encoder, hiss(1.0, amplitude=6000))
    assert louder[20:60] - noisy[20:60] == pytest.approx(20 * np.log10(2), abs=0.1)  # dB in every band


def test_silence_is_finite(encoder: Encoder) -> None:
    assert np.isfinite(encoder.prepare((np.zeros(RATE, np.int16), RATE))).all()


@pytest.mark.parametrize(("samples", "rate"), [(0, 16000), (1023, 16000), (1500, 24000)])
def test_too_short_is_skipped(encoder: Encoder, samples: int, rate: int) -> None:
    with pytest.raises(Skip, match=f"^{samples} samples"):
        encoder.prepare((tone(200, 1.0, rate)[:samples], rate))


def test_a_long_clip_is_analysed_in_pieces(encoder: Encoder) -> None:
    samples = hiss(1.5 * PIECE / RATE)
    halves = [encoder.prepare((half, RATE)) for half in np.split(samples, 2)]
    assert np.array_equal(encoder.prepare((samples, RATE)), np.concatenate(halves))


def test_threads_at_once_give_the_same(encoder: Encoder) -> None:
    clips = [hiss(0.5, amplitude) for amplitude in range(500, 4500, 500)]
    expected = [encoder.prepare((clip, RATE)) for clip in clips]
    with ThreadPoolExecutor(4) as threads:
        for found, alone in zip(threads.map(lambda clip: encoder.prepare((clip, RATE)), clips), expected, strict=True):
            assert np.array_equal(found, alone)
    assert encoder.encode(expected) == expected and encoder.size(expected[0]) == 26


@pytest.mark.parametrize("options", [{"mels": 40}, {"mels": 0, "mfcc": 20}, {"mels": 40, "mfcc": 20, "dtype": "x"}])
def test_a_bad_config_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Config(**options)


@pytest.mark.skipif(not EMODB.is_dir(), reason=f"{EMODB}, real emotional speech, is not there")
def test_anger_and_sadness_of_speakers_not_trained_on(encoder: Encoder) -> None:
    with open(EMODB / "clips.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] in ("anger", "sadness")]

    def statistics(row: dict[str, str]) -> np.ndarray:
        samples, _ = load_audio(str(EMODB / row["path"]), RATE)
        pooled = pooled_row(row["name"], encoder.prepare((samples, RATE)), keep_frames=False, variance=True)
        return np.concatenate([pooled.mean, pooled.var])  # type: ignore[arg-type]  # both are there

    with ThreadPoolExecutor(2) as threads:
        features = np.stack(list(threads.map(statistics, rows)))
    held_out = np.array([row["split"] == "test" for row in rows])
    labels = np.array([row["label"] for row in rows])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=1000))
    assert model.fit(features[~held_out], labels[~held_out]).score(features[held_out], labels[held_out]) > 0.9


def test_a_model_card_tells_that_there_is_no_checkpoint(tmp_path: Path) -> None:
    p = load()
    write_details(tmp_path)
    details = json.loads((tmp_path / "details.json").read_text())
    described = {"seeds": list(range(details["seeds"])), "folds": details["folds"]}
    (tmp_path / "ensemble.json").write_text(json.dumps(described))
    card = render_card(Trained(p, tmp_path, tmp_path, ("acoustic", "hubert"), {}), details)
    assert "| acoustic | acoustic | audio | none: computed without weights | | |\n" in card
    assert "| hubert | hubert | audio | models/demo/hubert" in card
