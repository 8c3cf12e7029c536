"""Pre-training of the fusion's encoders: what it sees and what it never does, its loss, and what starts from it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fusion_data import LABELS, ROOT, make_inputs, pretraining, recipe, rounds, tiled, write_params, write_run
from safetensors.torch import load_file

from stages import pretrain_fusion, self_train, train_fusion
from stages.engine.errors import PipelineError
from stages.fusion import ensemble as ensemble_module
from stages.fusion.architectures import Architecture
from stages.fusion.ensemble import load_ensemble
from stages.fusion.features import Inputs, Standardised, fold_statistics
from stages.fusion.pretrained import Pretrained
from stages.fusion.pretraining import clips_seen, info_nce, pretrain
from stages.fusion.training import Training, train

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(inputs: Inputs, rows: np.ndarray) -> Inputs:
    """The same but for other features of these clips."""
    modalities = []
    for modality in inputs.modalities:
        matrix = modality.matrix.clone()
        matrix[:, rows] = 5 * torch.randn(matrix[:, rows].shape) * modality.present[rows, None]
        modalities.append(dataclasses.replace(modality, matrix=matrix))
    return dataclasses.replace(inputs, modalities=tuple(modalities))


def same(one: Pretrained, other: Pretrained, fold: int) -> bool:
    return all(torch.equal(values[:, fold], other.weights[name][:, fold]) for name, values in one.weights.items())


# ---------------------------------------------------------------- what is learned


def test_info_nce_is_finding_the_counterpart_in_both_directions() -> None:
    one, other = (torch.nn.functional.normalize(torch.randn(5, 3), dim=1) for _ in range(2))
    total = 0.0
    for i in range(5):
        for a, b in ((one, other), (other, one)):
            alike = torch.tensor([float(a[i] @ b[j]) / 0.2 for j in range(5)])
            total -= float(alike[i] - alike.exp().sum().log())
    assert float(info_nce(one, other, 0.2)) == pytest.approx(total / 10, rel=1e-5)
    assert float(info_nce(one[:0], other[:0], 0.2)) == 0


@pytest.mark.parametrize("architecture", ["attention", "late", "lmf", "transformer", "frames"])
def test_the_loss_falls_for_every_seed_and_fold(architecture: str) -> None:
    inputs, _ = make_inputs(unlabelled=60)
    p = recipe(architecture=architecture)
    pretrained, losses = pretrain(inputs, p, pretraining(epochs=8), include_test=False)
    fall = losses[..., 0] - losses[..., -1]
    assert losses.shape == (2, 3, 8) and fall.min() > 0 and fall.mean() > 0.05, losses
    shape = Architecture(architecture, ("a",), (10,), 4, p.hidden, 0.0, 0.0, True).build().encoders[0].state_dict()
    assert {name: tuple(v.shape) for name, v in shape.items()} == {
        name.removeprefix("sound."): tuple(v.shape[2:]) for name, v in pretrained.weights.items() if "sound" in name}
    weights = pretrained.weights["face.linear_1.weight"].flatten(0, 1)
    assert len({values.numpy().tobytes() for values in weights}) == 6  # seeds and folds have their own


def test_a_modality_alone_is_compared_with_itself_under_dropout() -> None:
    inputs, _ = make_inputs(unlabelled=60)
    alone = inputs.select(["sound"])
    _, losses = pretrain(alone, recipe(), pretraining(epochs=8), include_test=False)
    assert (losses[..., -1] < losses[..., 0] - 0.02).all()
    with pytest.raises(PipelineError, match="fusion.dropout: found 0, expected more"):
        pretrain(alone, recipe(dropout=0.0), pretraining(), include_test=False)


def test_encodings_of_new_clips_find_their_counterparts() -> None:
    """What it is for: of clips that were not seen, the modalities' encodings are alike more than by chance."""
    inputs, truth = make_inputs(labelled=90, unlabelled=150, absent=0.0)
    pretrained, _ = pretrain(inputs, recipe(hidden=32), pretraining(epochs=15), include_test=False)
    rates: list[float] = []
    for start in (None, pretrained):
        model = Training(inputs, recipe(hidden=32), inputs.labels, feed_of(inputs), 0, 0, start).model.eval()
        encoded = [encoder(x) for encoder, x in zip(model.encoders, feed_of(inputs)(valid_of(inputs))[0], strict=True)]
        encoded = [torch.nn.functional.normalize(e - e.mean(dim=0), dim=1) for e in encoded]
        same_class = torch.from_numpy(truth[valid_of(inputs)][:, None] == truth[valid_of(inputs)])
        alike = torch.stack([e @ e.T for e in encoded]).mean(dim=0)
        rates.append((alike[same_class].mean() - alike[~same_class].mean()).item())
    assert rates[1] > rates[0] + 0.1, rates  # what modalities share here is the class


def feed_of(inputs: Inputs) -> Standardised:
    return Standardised(inputs, fold_statistics(inputs, recipe()), 0)


def valid_of(inputs: Inputs) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(inputs.folds == 0))


# ---------------------------------------------------------------- what is never seen


def test_a_fold_s_encoders_never_see_its_validation_clips() -> None:
    inputs, _ = make_inputs()
    before, _ = pretrain(inputs, recipe(), pretraining(), include_test=True)
    after, _ = pretrain(changed(inputs, np.flatnonzero(inputs.folds == 1)), recipe(), pretraining(), include_test=True)
    assert same(before, after, 1)  # neither the clips nor their statistics
    assert not same(before, after, 0) and not same(before, after, 2)


@pytest.mark.parametrize("include_test", [False, True])
def test_test_clips_are_seen_only_where_self_training_may_use_them(include_test: bool) -> None:
    inputs, _ = make_inputs()
    before, _ = pretrain(inputs, recipe(), pretraining(), include_test)
    after, _ = pretrain(changed(inputs, np.flatnonzero(inputs.splits == "test")), recipe(), pretraining(), include_test)
    assert [same(before, after, fold) for fold in range(3)] == [not include_test] * 3


def test_labels_do_not_matter_and_clips_with_one_modality_are_left_out() -> None:
    inputs, _ = make_inputs(absent=0.4)
    before, _ = pretrain(inputs, recipe(), pretraining(), include_test=False)
    labels = np.where(inputs.labels >= 0, (inputs.labels + 1) % len(LABELS), -1)
    after, _ = pretrain(dataclasses.replace(inputs, labels=labels), recipe(), pretraining(), include_test=False)
    assert all(same(before, after, fold) for fold in range(3))
    seen = clips_seen(inputs, 1, include_test=False)
    assert (inputs.present[seen].sum(dim=1) >= 2).all() and "unlabelled" in set(inputs.splits[seen])
    assert not (inputs.folds[seen] == 1).any() and "test" not in set(inputs.splits[seen])
    assert len(seen) < len(inputs.clip_ids) - (inputs.folds == 1).sum() - (inputs.splits == "test").sum()


def test_the_same_bits_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = make_inputs()
    found = []
    for cores in (1, 4):
        monkeypatch.setattr(ensemble_module, "cores", lambda cores=cores: cores)
        torch.rand(7)
        found.append(pretrain(inputs, recipe(), pretraining(), include_test=False))
    assert all(same(found[0][0], found[1][0], fold) for fold in range(3)) and torch.equal(found[0][1], found[1][1])


# ---------------------------------------------------------------- what starts from it


def test_models_start_from_their_own_seed_and_fold_s_encoders() -> None:
    inputs, _ = make_inputs()
    pretrained, _ = pretrain(inputs, recipe(), pretraining(), include_test=False)
    for s, seed in enumerate((0, 7)):
        for chosen in (inputs, inputs.select(["face"])):
            fresh, model = (Training(chosen, recipe(), chosen.labels, feed_of(chosen), seed, 2, start).model
                            for start in (None, pretrained))
            for i, modality in enumerate(chosen.modalities):
                for name, values in model.encoders[i].state_dict().items():
                    assert torch.equal(values, pretrained.weights[f"{modality.name}.{name}"][s, 2])
            assert torch.equal(model.classifier.weight, fresh.classifier.weight)  # all else as without
    again = [train(inputs, recipe(), tiled(inputs, recipe()), "test", start=pretrained) for _ in range(2)]
    assert torch.equal(again[0].votes, again[1].votes)  # training does not write into what it starts from
    assert not torch.equal(again[0].votes, train(inputs, recipe(), tiled(inputs, recipe()), "test").votes)


def test_what_does_not_fit_is_one_line() -> None:
    inputs, _ = make_inputs()
    with pytest.raises(PipelineError, match="pretraining.method: expected off, since .* concatenation has no"):
        pretrain(inputs, recipe(architecture="concatenation"), pretraining(), include_test=False)
    pretrained, _ = pretrain(inputs, recipe(), pretraining(epochs=1), include_test=False)
    for other in (recipe(hidden=8), recipe(architecture="concatenation"), recipe(seeds=[0, 1])):
        with pytest.raises(PipelineError, match="models/pretraining/encoders.safetensors: .*run dvc|expected off"):
            train(inputs, other, tiled(inputs, other), "test", start=pretrained)


def stages(folder: Path, monkeypatch: pytest.MonkeyPatch, **before: object) -> dict[str, bytes]:
    """Run the three stages in a new folder; the bytes of what they leave."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_run(folder, make_inputs()[0])
    write_params(recipe(), rounds(), pretraining(**before))
    for name in ("dvc.yaml", "stages"):
        Path(name).symlink_to(ROOT / name)
    for stage in (pretrain_fusion, train_fusion, self_train):
        stage.main()
    return {str(path): path.read_bytes() for path in sorted(Path("models").rglob("*")) if path.is_file()}


def test_the_stages_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = stages(tmp_path / "off", monkeypatch, method="off", epochs=9)
    described = json.loads(off["models/pretraining/pretraining.json"])
    assert described["method"] == "off" and "random" in described["note"]
    assert [name for name in off if name.startswith("models/pretraining")] == ["models/pretraining/pretraining.json"]

    on = stages(tmp_path / "on", monkeypatch)
    assert stages(tmp_path / "again", monkeypatch) == on
    curves = pd.read_csv("models/pretraining/curves.csv")
    assert len(curves) == 2 * 3 * 4 and set(curves["seed"]) == {0, 7}
    described = json.loads(on["models/pretraining/pretraining.json"])
    assert described["test_clips_seen"] and len(described["clips_by_fold"]) == 3
    for ensemble in ("models/fusion", "models/self_training"):
        name = f"{ensemble}/ensemble.safetensors"
        assert on[name] != off[name]

    # Round 1 starts from the pre-trained encoders again: with a rate next to nothing that is what it ends with
    write_params(recipe(learning_rate=1e-9), rounds(rounds=1), pretraining())
    train_fusion.main()
    self_train.main()
    start, end = load_file("models/pretraining/encoders.safetensors"), load_ensemble("models/self_training").weights
    for i, name in enumerate(recipe().modalities):
        torch.testing.assert_close(end[f"encoders.{i}.linear_1.weight"], start[f"{name}.linear_1.weight"])


def test_missing_pretraining_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, make_inputs()[0])
    write_params(recipe(), rounds(), pretraining())
    with pytest.raises(PipelineError, match="models/pretraining/encoders.safetensors: can't be read .*; run dvc repro"):
        train_fusion.main()
