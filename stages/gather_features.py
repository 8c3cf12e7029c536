"""Stage gather_features: which features the fusion uses, and which clips lack what.

It stands between the extractors and the fusion so that a row added to `extractors` does not retrain a fusion
that does not use it: features/ changes, this stage reruns in a second, data/modalities.json stays the same.
"""

from pathlib import Path
from typing import Any

from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import write_json, write_rows
from stages.engine.params import load_fusion
from stages.engine.store import Store

MEDIA = {"extract_audio": "data/audio", "slice_frames": "data/frames", "crop_faces": "data/faces"}


def describe_modality(name: str, stores: dict[str, Store]) -> dict[str, Any]:
    """What the fusion must know of one modality; the digest covers every clip's features."""
    first = next(iter(stores.values()))
    folds = int(first.attrs.get("folds", 1))  # its mean holds the features of so many folds, one after another
    return {
        "name": name,
        "folder": str(Path("features") / name),
        "dimension": int(first.attrs["dimension"]) // folds,
        "statistics": ["mean", "var"] if first.attrs["variance"] else ["mean"],
        "per_fold": folds > 1,
        "present": int(first.present.sum()),
        "digest": {part: store.digest for part, store in stores.items()},
    }


def open_modality(name: str) -> dict[str, Store]:
    """The modality's stores: one (".") or, where its encoder is trained per fold, one per fold."""
    folder = Path("features") / name
    if not folder.is_dir():
        raise PipelineError(f"{folder}: not found; expected the features of fusion.modalities {name!r}")
    folds = sorted(path.name for path in folder.glob("fold-*"))
    return {part: Store(folder / part) for part in folds or ["."]}


def skipped(modalities: dict[str, dict[str, Store]]) -> list[tuple[str, str, str, str]]:
    """(clip_id, stage, present, reason) wherever a stage recorded something; a loss is listed where it began."""
    stores = {stage: Store(folder) for stage, folder in MEDIA.items() if Path(folder).exists()}  # imports have none
    for name, parts in modalities.items():
        store = next(iter(parts.values()))
        command = "import" if store.attrs.get("encoder") == "npy" else "extract"
        stores["extract_emovclip" if name == "emovclip" else f"{command}@{name}"] = store
    return [
        (clip_id, stage, "true" if present else "false", reason)
        for stage, store in stores.items()
        for clip_id, present, reason in zip(store.clip_ids, store.present, store.reasons, strict=True)
        if reason
    ]


def main() -> None:
    p = load_fusion()
    modalities = {name: open_modality(name) for name in p.fusion.modalities}
    described = [describe_modality(name, stores) for name, stores in modalities.items()]
    write_json("data/modalities.json", {"modalities": described})
    write_rows("reports/skipped.csv", ["clip_id", "stage", "present", "reason"], sorted(skipped(modalities)))


if __name__ == "__main__":
    run_stage(main)
