"""The demo corpus: real clips in the MER2024 raw layout, drawn from a seed.

raw/video-labeled/, raw/video-unlabeled-with-test2noise/ (unlabelled and test clips, as published),
raw/label-disdim.csv, raw/label-transcription.csv, raw/candidate_20000.csv (the clips that are scored); and, apart
from it, truth.csv with the labels of the unlabelled and test clips, which only evaluation may see.
"""

import csv
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stages.corpora.demo.plan import SHARES, ClipPlan, make_plan
from stages.corpora.demo.text import draw, sentences
from stages.engine.errors import PipelineError

__all__ = ["make_corpus", "sentences"]
SHORTEST, LONGEST = 1.0, 3.0  # seconds
SPELLING = {"anger": "angry", "happiness": "happy", "sadness": "sad", "worry": "worried"}  # MER's, else as ours
VALENCE = {"neutral": 0.0, "anger": -3.0, "happiness": 3.5, "sadness": -2.5, "worry": -1.5, "surprise": 0.8}


def make_corpus(
    folder: Path, seed: int, labelled: int, unlabelled: int, test: int, labels: Sequence[str], workers: int
) -> None:
    """Write the corpus into an empty folder; the same bytes whatever the number of workers.

    Raises PipelineError if `labels` are not the six that the demo can show.
    """
    if set(labels) != set(SHARES):
        raise PipelineError(f"corpus.labels: found {list(labels)}, expected {list(SHARES)} for the demo corpus")
    plans = make_plan(seed, labelled, unlabelled, test)
    for name in ("video-labeled", "video-unlabeled-with-test2noise"):
        (folder / "raw" / name).mkdir(parents=True)
    texts = {plan.name: draw(plan.text, np.random.default_rng([*plan.seed, 0])) for plan in plans}
    # spawn: forking after OpenCV has started its threads can dead-lock
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        done = pool.map(_render_into, [folder] * len(plans), plans, texts.values(), chunksize=8)
        for _ in tqdm(done, total=len(plans), desc="demo", unit="clip", mininterval=1):
            pass
    spelled = {plan.name: SPELLING.get(plan.label, plan.label) for plan in plans}
    by_split = {s: [plan for plan in plans if plan.split == s] for s in ("labelled", "unlabelled", "test")}
    _write(folder / "raw/label-disdim.csv", ("name", "discrete", "valence"),
           ((p.name, spelled[p.name], VALENCE[p.label]) for p in by_split["labelled"]))
    _write(folder / "raw/label-transcription.csv", ("name", "chinese", "english"),
           ((p.name, texts[p.name], "") for p in plans if p.broken != "no transcript"))
    _write(folder / "raw/candidate_20000.csv", ("name",), ((p.name,) for p in by_split["test"]))
    _write(folder / "truth.csv", ("name", "discrete"),
           ((p.name, spelled[p.name]) for p in plans if p.split != "labelled"))


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _render_into(folder: Path, plan: ClipPlan, text: str) -> None:
    name = "video-labeled" if plan.split == "labelled" else "video-unlabeled-with-test2noise"
    render(folder / "raw" / name / f"{plan.name}.mp4", plan, text)


def render(path: Path, plan: ClipPlan, text: str) -> None:
    """Draw, speak and write one clip, broken in its way if it is to be."""
    import cv2

    from stages.corpora.demo.portraits import animate
    from stages.corpora.demo.speech import RATE, speak
    from stages.corpora.demo.video import FPS, write_clip

    cv2.setNumThreads(1)  # clips are drawn in parallel
    rng = np.random.default_rng([*plan.seed, 1])
    waveform = speak(text, plan.voice, rng)
    count = int(np.clip(np.ceil(len(waveform) / RATE * FPS), SHORTEST * FPS, LONGEST * FPS))
    samples = count * RATE // FPS
    waveform = np.pad(waveform[:samples], (0, max(0, samples - len(waveform))))
    frames = animate(plan.face, _loudness(waveform, count), rng, with_face=plan.broken != "no face")
    write_clip(
        path,
        [] if plan.broken == "no video stream" else frames,
        None if plan.broken == "no audio stream" else waveform,
        RATE,
    )
    if plan.broken == "truncated":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])


def _loudness(waveform: np.ndarray, count: int) -> np.ndarray:
    """Loudness of each frame's sound, 0..1 of the clip's loudest."""
    pieces = np.array_split(waveform, count)
    level = np.array([np.sqrt(np.mean(piece**2)) for piece in pieces])
    return level / max(float(level.max()), 1e-9)
