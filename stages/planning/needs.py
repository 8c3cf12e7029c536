"""What of the pipeline fusion.modalities needs."""

from pathlib import Path

from stages.engine.inputs import TEXTS
from stages.engine.params import Params

PROMPTS = "models/emovclip"  # what train_emovclip writes
MEDIA = ("audio", "frames", "faces")


def media_read(p: Params) -> set[str]:
    """What the rows that fusion.modalities names take as input."""
    return {p.extractors[name].input for name in p.fusion.modalities}


def made_here(p: Params, folder: str) -> bool:
    """Whether a stage of this pipeline makes this folder of weights."""
    return folder == PROMPTS or (p.corpus.adapter == "demo" and Path(folder).is_relative_to("models/demo"))


def left_out(p: Params) -> dict[str, str | None]:
    """Media and trained parts by their names in data/plan -> why they are not made, None where they are.

    The reasons do not depend on what else fusion.modalities names: an unchanged file reruns nothing.
    """
    read = media_read(p)
    hears = bool(read & set(TEXTS)) and p.transcribe.checkpoint is not None  # speech recognition needs the sound
    left: dict[str, str | None] = {"corpus": None}
    for medium in MEDIA:
        wanted = medium in read or (medium == "audio" and hears)
        left[medium] = None if wanted else f"no row of fusion.modalities reads data/{medium}"
    left["transcripts.csv"] = None if read & set(TEXTS) else "no row of fusion.modalities reads words"
    left["rankings.jsonl"] = None if "rankings.jsonl" in read else "no row of fusion.modalities reads rankings"
    loads = {folder for name in p.fusion.modalities for folder in p.extractors[name].loads.values()}
    left["emovclip"] = None if PROMPTS in loads else f"no row of fusion.modalities loads {PROMPTS}"
    return left
