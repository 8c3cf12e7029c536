"""How far the ensemble's probabilities can be believed: calibration error, and one temperature that mends it.

Temperature scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2) on probabilities instead
of logits: p^(1/T), renormalised, is the softmax of log p / T. No label changes. T > 1 makes the models less sure.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from stages.engine.errors import PipelineError

BINS = 15              # [choice, and Guo et al.'s] of equal width, by the probability of the label that is called
BOUNDS = (0.1, 10.0)   # of the temperature: where out of fold every clip is right, the best one would be 0
STEPS = 921            # temperatures that are tried between them, half a percent apart
TINY = 1e-30           # below it a probability counts as this; float32's softmax can be 0


def reliability(probabilities: np.ndarray, actual: np.ndarray) -> pd.DataFrame:
    """A row per bin that holds a clip: bin, clips, their mean confidence and their accuracy in percent.

    probabilities: (N, L); actual: (N,) classes.
    """
    confidence = probabilities.max(axis=1)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    table = pd.DataFrame({"bin": bins, "clips": 1, "confidence": 100.0 * confidence,
                          "accuracy": 100.0 * (probabilities.argmax(axis=1) == actual)})
    return table.groupby("bin").agg({"clips": "sum", "confidence": "mean", "accuracy": "mean"}).reset_index()


def calibration_error(probabilities: np.ndarray, actual: np.ndarray) -> float:
    """Expected calibration error (ECE) in percent: the bins' gaps between confidence and accuracy, by clips."""
    table = reliability(probabilities, actual)
    gaps = (table["confidence"] - table["accuracy"]).abs()
    return float((gaps * table["clips"]).sum() / table["clips"].sum())


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """p^(1/T), renormalised over the last axis, in float64; a temperature of 1 gives the probabilities as they are."""
    if temperature == 1:
        return probabilities
    logits = np.log(np.maximum(probabilities.astype(np.float64), TINY)) / temperature
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def fit_temperature(probabilities: np.ndarray, actual: np.ndarray) -> float:
    """The temperature within BOUNDS at which the actual classes are likeliest, half a percent exact.

    probabilities: (N, L) of clips that the models have not learned from; actual: (N,) classes.
    """
    tried = np.geomspace(*BOUNDS, STEPS).round(4)
    likely = [np.log(tempered(probabilities, t)[np.arange(len(actual)), actual] + TINY).mean() for t in tried]
    return float(tried[np.argmax(likely)])


def read_temperature(path: Path, ensemble: str) -> float:
    """The temperature that evaluate wrote for the ensemble with this digest. Raises PipelineError for another's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        temperature, made_for = float(content["temperature"]), content["ensemble"]
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; the probabilities' temperature is made by: dvc repro evaluate"
                            ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{path}: can't be read ({error}); make it anew with: dvc repro evaluate") from None
    if made_for != ensemble:
        raise PipelineError(f"{path}: made for other models than those that are there now; run dvc repro evaluate")
    if not BOUNDS[0] <= temperature <= BOUNDS[1]:
        raise PipelineError(f"{path}: temperature: found {temperature}, expected {BOUNDS[0]} to {BOUNDS[1]}")
    return temperature
