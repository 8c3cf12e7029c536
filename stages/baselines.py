"""Stage baselines: the majority class and logistic regression on the fusion's folds, features and clips."""

from pathlib import Path

from stages.engine.devices import pick_device, set_threads
from stages.engine.errors import run_stage
from stages.engine.files import empty_folder, write_json, write_tensors
from stages.engine.manifest import read_manifest
from stages.engine.params import load_fusion

OUT = Path("models/baselines")


def main() -> None:
    p = load_fusion()
    device = pick_device(p.runtime.device)
    import numpy as np

    from stages.fusion.baselines import baselines
    from stages.fusion.features import load_inputs, write_clips

    inputs = load_inputs(p.fusion.modalities, p.corpus.labels, device)
    set_threads(len(inputs.labelled) < 1000)  # one fit after the other, by all cores where a product takes long enough
    groups = np.array([clip.group for clip in read_manifest()], dtype=np.str_)
    found = baselines(inputs, p.fusion, groups)
    empty_folder(OUT)
    parts = ("out_of_fold", "others")
    write_tensors(OUT / "predictions.safetensors", {
        f"{name}.{part}": tensor for name in ("majority", "logistic_regression")
        for part, tensor in zip(parts, getattr(found, name), strict=True)})
    write_clips(OUT, inputs)
    write_json(OUT / "chosen.json", [
        {"seed": seed, "fold": fold, "C": c, "inner_waf": round(score, 4)}
        for seed, own, scores in zip(p.fusion.seeds, found.chosen, found.inner_waf, strict=True)
        for fold, (c, score) in enumerate(zip(own, scores, strict=True))])


if __name__ == "__main__":
    run_stage(main)
