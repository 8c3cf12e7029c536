"""Stage train_fusion: the fusion on the labelled clips, all folds and seeds at once (round 0)."""

from pathlib import Path

from stages.engine.devices import pick_device, set_threads
from stages.engine.errors import run_stage
from stages.engine.files import write_json
from stages.engine.params import load_fusion


def main() -> None:
    p = load_fusion()
    device = pick_device(p.runtime.device)
    import numpy as np

    from stages.fusion.architectures import segments_read
    from stages.fusion.ensemble import cross_validation, curve_table, save_outputs
    from stages.fusion.features import load_inputs
    from stages.fusion.pretrained import load_pretrained
    from stages.fusion.training import train

    inputs = load_inputs(p.fusion.modalities, p.corpus.labels, device, segments_read(p.fusion))
    set_threads(True)  # models are computed side by side, each by one thread
    labels = np.tile(inputs.labels, (len(p.fusion.seeds), 1))
    outputs = train(inputs, p.fusion, labels, "train_fusion", load_pretrained(p.pretraining.method))
    save_outputs(Path("models/fusion"), inputs, outputs, curve_table(0, outputs))
    figures = {name: round(value, 4) for name, value in cross_validation(inputs, outputs).items()}
    counts = {"clips": len(inputs.labelled), "parameters_per_model": outputs.ensemble.parameters_per_model}
    write_json("reports/fusion.json", {"cv": figures, **counts})


if __name__ == "__main__":
    run_stage(main)
