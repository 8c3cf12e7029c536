"""Stage pretrain_fusion: what the fusion's encoders start from, learned from all clips without labels, if at all."""

from pathlib import Path

from stages.engine.devices import pick_device, set_threads
from stages.engine.errors import run_stage
from stages.engine.files import empty_folder, replacing, write_json
from stages.engine.params import load_fusion

FOLDER = Path("models/pretraining")


def main() -> None:
    p = load_fusion()
    if p.pretraining.method == "off":
        empty_folder(FOLDER)
        write_json(FOLDER / "pretraining.json", {"method": "off", "note": "encoders start from random weights"})
        return
    device = pick_device(p.runtime.device)
    import pandas as pd

    from stages.fusion.architectures import segments_read
    from stages.fusion.features import load_inputs
    from stages.fusion.pretraining import clips_seen, pretrain

    inputs = load_inputs(p.fusion.modalities, p.corpus.labels, device, segments_read(p.fusion))
    set_threads(True)  # models are computed side by side, each by one thread
    include_test = p.transductive  # what self-training may use too
    pretrained, losses = pretrain(inputs, p.fusion, p.pretraining, include_test)
    empty_folder(FOLDER)
    pretrained.save(FOLDER)
    index = pd.MultiIndex.from_product([p.fusion.seeds, range(inputs.fold_count), range(1, p.pretraining.epochs + 1)],
                                       names=["seed", "fold", "epoch"])
    with replacing(FOLDER / "curves.csv") as file:
        pd.DataFrame({"loss": losses.flatten().numpy()}, index).round(6).to_csv(file, lineterminator="\n")
    clips = [len(clips_seen(inputs, fold, include_test)) for fold in range(inputs.fold_count)]
    write_json(FOLDER / "pretraining.json", {"method": p.pretraining.method, "clips_by_fold": clips,
                                             "test_clips_seen": include_test})


if __name__ == "__main__":
    run_stage(main)
