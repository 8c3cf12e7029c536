"""Stage train_fusion: the attention fusion on the labelled clips, all folds and seeds at once (round 0)."""

import sys
from pathlib import Path

from stages.engine.devices import pick_device, set_threads
from stages.engine.errors import run_stage
from stages.engine.params import load_fusion


def main() -> None:
    p = load_fusion()
    device = pick_device(p.runtime.device)
    import numpy as np

    from stages.fusion.ensemble import cross_validation, curve_table, save_outputs
    from stages.fusion.features import GROUP_MINIMUM, load_inputs
    from stages.fusion.training import train

    inputs = load_inputs(p.fusion.modalities, p.corpus.labels, device)
    set_threads(True)  # models are computed side by side, each by one thread
    labels = np.tile(inputs.labels, (len(p.fusion.seeds), 1))
    outputs = train(inputs, p.fusion, labels, "train_fusion")
    save_outputs(Path("models/fusion"), inputs, outputs, curve_table(0, outputs))
    for name in p.fusion.by_group:
        if name not in outputs.ensemble.groups:
            print(f"warning: train_fusion: fusion.standardize: no group of data/manifest.csv has {GROUP_MINIMUM} clips "
                  f"with {name}: it is standardised by the fold's training part", file=sys.stderr)
    figures = cross_validation(inputs, outputs)
    print(f"train_fusion: {outputs.ensemble.parameters_per_model} parameters per model; cross-validated WAF "
          f"{figures['waf_last_epoch']:.2f} at the last epoch, {figures['waf_best_epoch']:.2f} at each fold's best")


if __name__ == "__main__":
    run_stage(main)
