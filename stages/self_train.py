"""Stage self_train: rounds of pseudo-labels and retraining, from round 0 in models/fusion."""

import hashlib
import shutil
import sys
from pathlib import Path

from stages.engine.devices import pick_device, set_threads
from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import replacing
from stages.engine.fingerprint import PARTS, stage_fingerprint
from stages.engine.params import load_fusion

READ = ("data/manifest.csv", "data/folds.csv", "data/modalities.json", "data/voices.csv",
        "models/fusion/ensemble.safetensors", "models/fusion/predictions.safetensors")
# The features themselves are in modalities.json, as digests


def main() -> None:
    p = load_fusion()
    device = pick_device(p.runtime.device)
    import pandas as pd
    import torch
    from safetensors.torch import save

    from stages.fusion import self_training
    from stages.fusion.architectures import segments_read
    from stages.fusion.ensemble import cross_validation, curve_table, load_outputs, save_outputs
    from stages.fusion.features import load_inputs
    from stages.fusion.pretrained import load_pretrained

    inputs = load_inputs(p.fusion.modalities, p.corpus.labels, device, segments_read(p.fusion))
    set_threads(True)  # models are computed side by side, each by one thread
    start = load_outputs(Path("models/fusion"))
    if list(start.ensemble.seeds) != p.fusion.seeds or start.votes.shape[2] != len(inputs.others):
        raise PipelineError("models/fusion: found models of other seeds or clips; run dvc repro train_fusion")
    content = b"".join(hashlib.sha256(Path(path).read_bytes()).digest() for path in READ)
    folder = PARTS / "self_train" / stage_fingerprint("self_train", content)

    test = torch.from_numpy(inputs.splits[inputs.others] == "test")
    in_use = self_training.no_pseudo_labels()
    rows, pseudo_labels, curves, test_probabilities = [], [], [], []
    selected, best = start, -1.0
    pool = self_training.pool_rows(inputs, p.transductive)
    pretrained = load_pretrained(p.pretraining.method)
    for done in self_training.self_train(inputs, p.fusion, p.self_training, pool, start, folder, pretrained):
        in_use = self_training.pseudo_labels_in_use(p.self_training, in_use, done.chosen)
        rows.append(self_training.round_row(inputs, p.self_training, pool, done, in_use))
        pseudo_labels.append(self_training.pseudo_label_table(inputs, done))
        curves.append(curve_table(done.number, done.outputs))
        test_probabilities.append(done.outputs.votes.mean(dim=1)[:, test])
        waf = cross_validation(inputs, done.outputs)["waf_last_epoch"]
        if p.self_training.select == "last" or waf > best:
            selected, best = done.outputs, waf
    if len(rows) <= p.self_training.rounds:
        print(f"warning: self_train: stopped after round {len(rows) - 1} of {p.self_training.rounds}: no clip of the "
              f"pool is left to choose (reports/rounds.csv)", file=sys.stderr)

    out, chosen = Path("models/self_training"), pd.concat(pseudo_labels)
    save_outputs(out, inputs, selected, pd.concat(curves))
    with replacing(out / "rounds.safetensors", "wb") as file:
        file.write(save({"test_probabilities": torch.stack(test_probabilities)}))
    for path, table in (("reports/rounds.csv", pd.DataFrame(rows)), ("reports/pseudo_labels.csv", chosen)):
        with replacing(path) as file:
            table.to_csv(file, index=False, lineterminator="\n")
    shutil.rmtree(folder, ignore_errors=True)  # the outs are complete, and only resuming needs the rounds


if __name__ == "__main__":
    run_stage(main)
