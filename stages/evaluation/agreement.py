"""How often each voice of the rankings agrees with the labels, with the ensemble and with the other voices."""

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from stages.evaluation.artefacts import Run
from stages.rankings.voices import read_voices


def agreement(run: Run, predictions: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per voice: `ranked` clips, and shares in percent (None where no clip can be compared).

    `labels`: of the labelled clips, and those whose truth is known, the share whose label the voice ranks first;
    `second`: first or second; `ensemble`: of all clips, the share that the ensemble calls so too. `others`: with each
    other voice.
    """
    voices = read_voices()
    labels = dict(zip(run.final.labelled, run.actual, strict=True))
    labels |= {clip: k for clip, k in zip(run.final.others, run.truth, strict=True) if k >= 0}
    named = {clip: run.labels[k] for clip, k in labels.items()}
    called = dict(zip(predictions["clip_id"], predictions["prediction"], strict=True))
    shares = {pair: share(voices[pair[0]], first(voices[pair[1]]), 1) for pair in combinations(voices, 2)}
    return [
        {
            "voice": voice,
            "ranked": len(ranked),
            "labels": share(ranked, named, 1),
            "second": share(ranked, named, 2),
            "ensemble": share(ranked, called, 1),
            "others": {
                other: shares.get((voice, other), shares.get((other, voice))) for other in voices if other != voice
            },
        }
        for voice, ranked in voices.items()
    ]


def first(ranked: dict[str, list[str]]) -> dict[str, str]:
    return {clip: ranking[0] for clip, ranking in ranked.items()}


def share(ranked: dict[str, list[str]], labels: dict[str, str], places: int) -> float | None:
    """Percent of the clips in both whose label is among the first places."""
    right = [labels[clip] in ranking[:places] for clip, ranking in ranked.items() if clip in labels]
    return 100 * float(np.mean(right)) if right else None
