"""What of the pipeline fusion.modalities needs, or has needed before on this corpus.

What dvc.lock knows as made for this corpus stays made: an ablation that drops a modality throws nothing away.
"""

from pathlib import Path

from stages.engine.inputs import TEXTS
from stages.engine.params import Params
from stages.engine.yaml_file import read_yaml

PROMPTS = "models/emovclip"  # what train_emovclip writes
MEDIA = ("audio", "frames", "faces")
MAKERS = {"audio": "extract_audio", "frames": "slice_frames", "faces": "crop_faces", "emovclip": "train_emovclip",
          "rankings.jsonl": "rank_emotions"}
EMPTY_BYTES = 400  # a rankings.jsonl that ranks nothing has fewer, one of a corpus more
RECOGNISED = Path(".cache/transcripts")  # of transcribe


def media_read(p: Params) -> set[str]:
    """What the rows that fusion.modalities names take as input, and self-training's voices."""
    voices = {"rankings.jsonl"} if p.self_training.voices else set()
    return {p.extractors[name].input for name in p.fusion.modalities} | voices


def trains_prompts(p: Params) -> bool:
    """Whether a row that fusion.modalities names loads what train_emovclip makes."""
    return any(PROMPTS in p.extractors[name].loads.values() for name in p.fusion.modalities)


def made_before(p: Params) -> set[str]:
    """Names in data/plan of what dvc.lock knows as made, and not empty, for this very corpus. Rankings that cost money
    are not among them: those are asked for where they are needed alone."""
    stages = read_yaml("dvc.lock").get("stages", {}) if Path("dvc.lock").exists() else {}
    corpus = stages.get("corpus", {})
    adapter = corpus.get("params", {}).get("params.yaml", {}).get("corpus.adapter")
    if adapter != p.corpus.adapter or p.corpus.path not in [dep["path"] for dep in corpus.get("deps", [])]:
        return set()
    outs = {name: stages.get(stage, {}).get("outs", []) for name, stage in MAKERS.items()}
    made = {name for name, found in outs.items() if any(out.get("nfiles", 0) > 1 for out in found)}
    voices = [p.rankings, *map(p.rankings.voice, p.rankings.providers)]
    if all(r.provider == "lexicon" for r in voices):
        made |= {"rankings.jsonl" for out in outs["rankings.jsonl"] if out["size"] > EMPTY_BYTES}
    return made | ({"transcripts.csv"} if RECOGNISED.exists() else set())


def made_here(p: Params, folder: str) -> bool:
    """Whether a stage of this pipeline makes this folder of weights."""
    return folder == PROMPTS or (p.corpus.adapter == "demo" and Path(folder).is_relative_to("models/demo"))


def left_out(p: Params) -> dict[str, str | None]:
    """Media and trained parts by their names in data/plan -> why they are not made, None where they are.

    The reasons do not depend on what else fusion.modalities names: an unchanged file reruns nothing.
    """
    read, before = media_read(p), made_before(p)
    hears = bool(read & set(TEXTS)) and p.transcribe.checkpoint is not None  # speech recognition needs the sound
    reasons = {medium: f"no row of fusion.modalities reads data/{medium}" for medium in MEDIA} | {
        "transcripts.csv": "no row of fusion.modalities reads words",
        "rankings.jsonl": "no row of fusion.modalities reads rankings",
        "emovclip": f"no row of fusion.modalities loads {PROMPTS}",
    }
    wanted = read | before | ({"audio"} if hears else set()) | ({"emovclip"} if trains_prompts(p) else set())
    if read & set(TEXTS) or p.transcribe.checkpoint is None:  # without one there are the corpus's own words alone
        wanted.add("transcripts.csv")
    return {"corpus": None} | {name: None if name in wanted else reason for name, reason in reasons.items()}
