"""Stage nested_cv: nested cross-validation of the fusion's params, for mer search; empty unless nested_cv.run."""

from pathlib import Path

from stages.engine.devices import pick_device, set_threads
from stages.engine.errors import run_stage
from stages.engine.files import empty_folder, write_json, write_tensors
from stages.engine.params import load_fusion

OUT = Path("models/nested")


def main() -> None:
    p = load_fusion()
    if not p.nested_cv.run:
        empty_folder(OUT)
        write_json(OUT / "nested.json", {})
        return
    device = pick_device(p.runtime.device)
    import torch

    from stages.fusion.features import load_inputs
    from stages.fusion.nested import nested

    inputs = load_inputs(p.fusion.modalities, p.corpus.labels, device)
    set_threads(True)  # models are computed side by side, each by one thread
    found = nested(inputs, p.fusion, "nested_cv")
    empty_folder(OUT)
    write_tensors(OUT / "predictions.safetensors",  # rows: the labelled clips in manifest order
                  {"probabilities": found.probabilities, "inner": torch.from_numpy(found.inner)})
    write_json(OUT / "nested.json", {"seeds": p.fusion.seeds, "inner_waf": found.inner.round(4).tolist(),
                                     "waf": found.outer(inputs).round(4).tolist()})


if __name__ == "__main__":
    run_stage(main)
