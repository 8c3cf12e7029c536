"""Stage gather_features: which features the fusion uses, which clips lack what, and what self-training's voices say.

It stands between the extractors and the fusion so that a row added to `extractors` does not retrain a fusion
that does not use it: features/ changes, this stage reruns in a second, data/modalities.json stays the same.
So too with the rankings: data/voices.csv changes where a voice does that self_training.voices names, else never.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import write_json, write_rows
from stages.engine.params import load_fusion
from stages.engine.store import Store
from stages.rankings.voices import PATH, read_voices

MEDIA = {"extract_audio": "data/audio", "slice_frames": "data/frames", "crop_faces": "data/faces"}


def describe_modality(name: str, store: Store) -> dict[str, Any]:
    """What the fusion must know of one modality. Digests: of every clip's features, and of what they were made from."""
    return {
        "name": name,
        "folder": str(store.folder),
        "dimension": int(store.attrs["dimension"]),
        "statistics": ["mean", "var"] if store.attrs["variance"] else ["mean"],
        "frames": store.keeps_frames,
        "per_fold": store.attrs.get("folds", 1) > 1,
        "leaky": bool(store.attrs.get("leaky", False)),
        "present": int(store.present.sum()),
        **{key: value for key, value in store.index.items() if key != "shards"},
    }


def open_modality(name: str) -> Store:
    folder = Path("features") / name
    if not folder.is_dir():
        raise PipelineError(f"{folder}: not found; expected the features of fusion.modalities {name!r}")
    store = Store(folder)
    if store.empty:
        raise PipelineError(f"{folder}: empty ({store.empty}), but fusion.modalities names it; once that is put right: "
                            f"dvc repro -f -s extract@{name}")
    return store


def skipped(modalities: dict[str, Store]) -> list[tuple[str, str, str, str]]:
    """(clip_id, stage, present, reason) wherever a stage recorded something; a loss is listed where it began."""
    stores = {stage: Store(folder) for stage, folder in MEDIA.items() if Path(folder).exists()}  # imports have none
    for name, store in modalities.items():
        stores[f"{'import' if store.attrs.get('encoder') == 'npy' else 'extract'}@{name}"] = store
    return [
        (clip_id, stage, "true" if present else "false", reason)
        for stage, store in stores.items()
        for clip_id, present, reason in zip(store.clip_ids, store.present, store.reasons, strict=True)
        if reason
    ]


def first_ranked(voices: Sequence[str]) -> list[tuple[str, str, str]]:
    """(clip_id, voice, the label that the voice ranks first) wherever one of these voices ranked a clip."""
    found = read_voices() if voices else {}
    for name in voices:
        if not found.get(name):
            raise PipelineError(f"{PATH}: found no clip that {name!r} ranked, but self_training.voices names it; take "
                                f"it out there, or make the rankings anew: dvc repro -f -s rank_emotions")
    return [(clip_id, name, ranking[0]) for name in voices for clip_id, ranking in found[name].items()]


def main() -> None:
    p = load_fusion()
    modalities = {name: open_modality(name) for name in p.fusion.modalities}
    described = [describe_modality(name, store) for name, store in modalities.items()]
    write_json("data/modalities.json", {"modalities": described})
    write_rows("reports/skipped.csv", ["clip_id", "stage", "present", "reason"], sorted(skipped(modalities)))
    write_rows("data/voices.csv", ["clip_id", "voice", "label"], first_ranked(p.self_training.voices))


if __name__ == "__main__":
    run_stage(main)
