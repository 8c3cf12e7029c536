"""What each demo clip shows, says and sounds like: drawn from the seed, before anything is rendered.

Every modality expresses the clip's label only part of the time, and otherwise something that it is easily
confused with; the three slips are independent. So one modality alone can't be right always, and all
together can do better than each: that is what the fusion has to learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# How often a modality expresses the label itself [tuned so that the miniature encoders reach 35 to 80 % WAF alone]
FIDELITY = {"face": 0.80, "voice": 0.86, "text": 0.65}
# What it expresses otherwise: faces mix up what looks alike, voices what is alike in arousal; text says little
CONFUSED: dict[str, dict[str, Sequence[str]]] = {
    "face": {"neutral": ("sadness", "worry"), "anger": ("worry", "neutral"), "happiness": ("surprise", "neutral"),
             "sadness": ("worry", "neutral"), "worry": ("sadness", "anger"), "surprise": ("happiness", "worry")},
    "voice": {"neutral": ("sadness", "happiness"), "anger": ("surprise", "happiness"),
              "happiness": ("surprise", "anger"), "sadness": ("neutral", "worry"), "worry": ("sadness", "anger"),
              "surprise": ("anger", "happiness")},
    "text": dict.fromkeys(("neutral", "anger", "happiness", "sadness", "worry", "surprise"),
                          ("neutral", "neutral", "worry", "surprise", "anger")),
}
# Shares of the classes, unbalanced like MER2023's and MER2024's training sets
SHARES = {"neutral": 0.24, "anger": 0.22, "happiness": 0.18, "sadness": 0.14, "worry": 0.12, "surprise": 0.10}
# The first unlabelled clips are broken on purpose, one of each kind
BROKEN_KINDS = ("no audio stream", "no video stream", "truncated", "no face", "no transcript")


@dataclass(frozen=True)
class ClipPlan:
    """One clip before rendering."""

    name: str
    split: str  # labelled, unlabelled or test
    label: str
    face: str  # the emotions that the modalities express
    voice: str
    text: str
    seed: tuple[int, int]  # of everything drawn while rendering
    broken: str = ""  # one of BROKEN_KINDS


def make_plan(seed: int, labelled: int, unlabelled: int, test: int) -> list[ClipPlan]:
    """The corpus: labelled clips, then unlabelled, then test, each with the classes' shares."""
    plans: list[ClipPlan] = []
    for split, count in (("labelled", labelled), ("unlabelled", unlabelled), ("test", test)):
        rng = np.random.default_rng([seed, len(plans)])
        labels = rng.permutation(spread(count))
        for i, label in enumerate(labels):
            number = len(plans) + 1
            broken = BROKEN_KINDS[i] if split == "unlabelled" and i < len(BROKEN_KINDS) else ""
            expressed = {modality: express(str(label), modality, rng) for modality in FIDELITY}
            plans.append(ClipPlan(f"samplenew_{number:08d}", split, str(label), **expressed, seed=(seed, number),
                                  broken=broken))
    return plans


def spread(count: int) -> list[str]:
    """`count` labels in the proportions of SHARES: largest remainders, so that small corpora keep every class."""
    exact = {label: share * count for label, share in SHARES.items()}
    counts = {label: int(value) for label, value in exact.items()}
    for label in sorted(exact, key=lambda name: counts[name] - exact[name])[: count - sum(counts.values())]:
        counts[label] += 1
    return [label for label, n in counts.items() for _ in range(n)]


def express(label: str, modality: str, rng: np.random.Generator) -> str:
    if rng.random() < FIDELITY[modality]:
        return label
    options = CONFUSED[modality][label]
    return options[int(rng.integers(len(options)))]
