"""Self-training: which clips are chosen, their effect, resuming to the same bits, the stage's files."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fusion_data import LABELS, ROOT, make_inputs, recipe, rounds, tiled, write_params, write_run
from safetensors.torch import load_file

from stages import self_train as stage
from stages import train_fusion
from stages.engine.errors import PipelineError
from stages.fusion import self_training
from stages.fusion.self_training import choose, no_pseudo_labels, pool_rows, pseudo_labels_in_use, self_train
from stages.fusion.training import train

pytestmark = pytest.mark.usefixtures("one_thread")


def make_votes(inputs, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(2, 3, len(inputs.others), len(LABELS), generator=generator)).softmax(dim=-1)


def start_of(inputs, p):
    return train(inputs, p, tiled(inputs, p), "test")


# ---------------------------------------------------------------- choosing


def test_pool_is_what_has_no_label_and_some_features():
    inputs, _ = make_inputs()
    for modality in inputs.modalities:
        modality.present[int(inputs.others[0])] = False
    assert set(pool_rows(inputs, True)) == set(inputs.others[1:])
    assert set(inputs.splits[pool_rows(inputs, False)]) == {"unlabelled"}


def test_the_k_surest_of_each_class():
    inputs, _ = make_inputs()
    votes, candidates = make_votes(inputs), pool_rows(inputs, False)
    chosen = choose(inputs, candidates, votes, None, no_pseudo_labels(), 1, rounds(k=3))
    position = {row: i for i, row in enumerate(inputs.others)}
    for seed in range(2):
        mean = votes[seed].mean(dim=0).numpy()
        for label in range(len(LABELS)):
            mine = chosen[(chosen["seed"] == seed) & (chosen["label"] == label)]
            sure = sorted(
                (-mean[position[row]].max(), row) for row in candidates if mean[position[row]].argmax() == label
            )
            assert mine["row"].tolist() == [row for _, row in sure[:3]]
            assert mine["confidence"].tolist() == [-p for p, _ in sure[:3]]
    assert set(inputs.splits[chosen["row"]]) == {"unlabelled"}
    assert (chosen["agreement"] == -1).all()


def test_ties_go_by_manifest_order():
    inputs, _ = make_inputs()
    votes = torch.full((2, 3, len(inputs.others), len(LABELS)), 0.1)
    votes[..., 1] = 0.7
    chosen = choose(inputs, pool_rows(inputs, True), votes, None, no_pseudo_labels(), 1, rounds(k=4))
    assert chosen["row"].tolist() == 2 * inputs.others[:4].tolist()
    assert set(chosen["label"]) == {1}  # the other classes have no candidate and add nothing


def test_accumulate_takes_no_clip_twice_and_redraw_grows():
    inputs, _ = make_inputs()
    candidates = pool_rows(inputs, True)
    for pool in ("accumulate", "redraw"):
        p, taken = rounds(pool=pool, k=2), no_pseudo_labels()
        for number in (1, 2, 3):
            chosen = choose(inputs, candidates, make_votes(inputs, seed=number), None, taken, number, p)
            taken = pseudo_labels_in_use(p, taken, chosen)
            assert not taken.duplicated(["seed", "row"]).any()
            counts = chosen.groupby(["seed", "label"]).size()
            assert set(counts) == {2 if pool == "accumulate" else 2 * number}
            assert len(taken) == 2 * len(LABELS) * 2 * number


def test_k_larger_than_the_pool_takes_what_there_is():
    inputs, _ = make_inputs()
    candidates = pool_rows(inputs, True)
    chosen = choose(inputs, candidates, make_votes(inputs), None, no_pseudo_labels(), 1, rounds(k=1000))
    assert sorted(chosen["row"]) == sorted([*candidates, *candidates])
    again = choose(inputs, candidates, make_votes(inputs), None, chosen, 2, rounds(k=1000))
    assert again.empty


def test_agreement_wants_a_second_opinion():
    inputs, _ = make_inputs()
    votes, candidates = make_votes(inputs), pool_rows(inputs, True)
    called = votes.mean(dim=1).argmax(dim=-1).numpy()
    generator = np.random.default_rng(0)
    opinions = np.where(generator.random((2, 3, len(inputs.others))) < 0.5, called[:, None], -1)
    agreeing = (opinions == called[:, None]).sum(axis=1)
    for wanted in (1, 2, 3):
        chosen = choose(inputs, candidates, votes, opinions, no_pseudo_labels(), 1, rounds(k=1000, agreement=wanted))
        position = np.searchsorted(inputs.others, chosen["row"])
        assert (chosen["agreement"] == agreeing[chosen["seed"], position]).all()
        assert len(chosen) == (agreeing >= wanted).sum()


# ---------------------------------------------------------------- rounds


def test_pseudo_labels_are_learned_and_never_validated(tmp_path, monkeypatch):
    inputs, _ = make_inputs()
    p, seen = recipe(epochs=2), []
    start = start_of(inputs, p)

    def spy(inputs, fusion, labels, name):
        seen.append(labels)
        return train(inputs, fusion, labels, name)

    monkeypatch.setattr(self_training, "train", spy)
    done = list(self_train(inputs, p, rounds(), start, tmp_path))
    assert [d.number for d in done] == [0, 1, 2]
    assert done[0].outputs is start and done[0].chosen.empty
    for number, labels in enumerate(seen, start=1):
        taken = pd.concat([d.chosen for d in done[1 : number + 1]])
        for seed in range(2):
            mine = taken[taken["seed"] == seed]
            assert (labels[seed, mine["row"]] == mine["label"]).all()
            assert (labels[seed] >= 0).sum() == len(inputs.labelled) + len(mine)
            assert (inputs.folds[mine["row"]] == -1).all()  # in no fold: in every training part, in no validation
            assert (labels[seed, inputs.labelled] == inputs.labels[inputs.labelled]).all()
    assert not torch.equal(done[1].outputs.votes, done[2].outputs.votes)
    assert done[2].outputs.out_of_fold_best.shape == start.out_of_fold_best.shape


def test_rounds_raise_the_score_where_labels_are_few(tmp_path):
    p = recipe(epochs=20, dropout=0.1, learning_rate=0.01, batch_size=8, modality_dropout=0.1)
    inputs, truth = make_inputs(labelled=36, unlabelled=300, test=0, noise=1.5, folds=2)
    done = list(self_train(inputs, p, rounds(rounds=3, k=15), start_of(inputs, p), tmp_path))
    answers = [d.outputs.votes.mean(dim=1).argmax(dim=-1).numpy() for d in done]
    accuracy = [(answer == truth[inputs.others]).mean() for answer in answers]
    chosen = pd.concat([d.chosen for d in done[1:]])
    assert (truth[chosen["row"]] == chosen["label"]).mean() > accuracy[0] + 0.2  # the surest are the right ones
    assert accuracy[-1] > accuracy[0] + 0.1


@pytest.mark.parametrize("changes", [{}, {"pool": "redraw"}, {"agreement": 1}])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, changes):
    p, inputs = recipe(epochs=2), make_inputs()[0]
    start = start_of(inputs, p)
    whole = list(self_train(inputs, p, rounds(rounds=3, **changes), start, tmp_path / "whole"))
    iterator = self_train(inputs, p, rounds(rounds=3, **changes), start, tmp_path / "killed")
    next(iterator), next(iterator)  # rounds 0 and 1 are done; now a kill while round 2 is written
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            next(iterator)
    trained = []

    def spy(inputs, fusion, labels, name):
        trained.append(name)
        return train(inputs, fusion, labels, name)

    monkeypatch.setattr(self_training, "train", spy)
    resumed = list(self_train(inputs, p, rounds(rounds=3, **changes), start, tmp_path / "killed"))
    assert trained == ["self_train round 2", "self_train round 3"]
    assert len(whole) == len(resumed) == 4
    for one, other in zip(whole, resumed, strict=True):
        pd.testing.assert_frame_equal(one.chosen, other.chosen)
        for name in self_training.PREDICTIONS:
            assert torch.equal(getattr(one.outputs, name), getattr(other.outputs, name))
        for name, values in one.outputs.ensemble.weights.items():
            assert torch.equal(values, other.outputs.ensemble.weights[name])
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_stops_when_the_pool_is_used_up(tmp_path):
    p, inputs = recipe(epochs=1), make_inputs(unlabelled=9, test=0)[0]
    start = start_of(inputs, p)
    for pool in ("accumulate", "redraw"):
        done = list(self_train(inputs, p, rounds(rounds=9, k=50, pool=pool), start, tmp_path / pool))
        assert len(done) < 5
        assert len(done[1].chosen) == 2 * 9


# ---------------------------------------------------------------- the stage


@pytest.fixture
def run(tmp_path, monkeypatch):
    inputs, _ = make_inputs()
    write_run(tmp_path, inputs)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    return inputs


def run_stages(p, fusion=None):
    write_params(fusion or recipe(epochs=2), p)
    train_fusion.main()
    stage.main()


def outputs():
    files = [*Path("models/self_training").iterdir(), Path("reports/rounds.csv"), Path("reports/pseudo_labels.csv")]
    return {path.name: path.read_bytes() for path in files}


def test_stage_writes_rounds_and_pseudo_labels(run):
    run_stages(rounds(rounds=3))
    table = pd.read_csv("reports/rounds.csv")
    added = [f"added_{name}" for name in LABELS]
    columns = ["round", "waf_best_epoch", "waf_last_epoch", "waf_std", "added", *added, "mean_confidence", "pool_left"]
    assert table.columns.tolist() == columns
    assert table["round"].tolist() == [0, 1, 2, 3]
    assert table["added"].tolist() == pytest.approx(table[added].sum(axis=1).tolist())
    assert table["pool_left"].tolist() == pytest.approx((44 - table["added"].cumsum()).tolist())
    assert np.isnan(table["mean_confidence"][0]) and (table["mean_confidence"][1:] > 0.25).all()
    curves = pd.read_csv("models/fusion/curves.csv").groupby(["seed", "fold"])["valid_waf"]
    assert table["waf_best_epoch"][0] == pytest.approx(curves.max().mean(), abs=1e-3)
    assert table["waf_last_epoch"][0] == pytest.approx(curves.last().mean(), abs=1e-3)

    labels = pd.read_csv("reports/pseudo_labels.csv")
    assert labels.columns.tolist() == ["round", "clip_id", "label", "confidence", "agreement", "seed"]
    assert labels["agreement"].isna().all() and set(labels["seed"]) == {0, 7} and set(labels["label"]) <= set(LABELS)
    assert labels.groupby("round").size().tolist() == (2 * table["added"][1:]).tolist()
    assert not labels.duplicated(["seed", "clip_id"]).any()

    rounds_file = load_file("models/self_training/rounds.safetensors")["test_probabilities"]
    final = load_file("models/self_training/predictions.safetensors")
    test = run.splits[run.others] == "test"
    assert rounds_file.shape == (4, 2, 14, 4)
    assert torch.equal(rounds_file[-1], final["votes"].mean(dim=1)[:, torch.from_numpy(test)])
    first = load_file("models/fusion/predictions.safetensors")
    assert torch.equal(rounds_file[0], first["votes"].mean(dim=1)[:, torch.from_numpy(test)])
    assert pd.read_csv("models/self_training/curves.csv")["round"].unique().tolist() == [0, 1, 2, 3]
    assert not list(Path(".cache/parts/self_train").iterdir())  # nothing is left of a run that ended

    before = outputs()
    stage.main()
    assert outputs() == before


def test_no_rounds_is_round_0(run):
    run_stages(rounds(rounds=0))
    for name in ("ensemble.safetensors", "ensemble.json", "predictions.safetensors", "clips.csv", "curves.csv"):
        assert Path("models/self_training", name).read_bytes() == Path("models/fusion", name).read_bytes()
    assert len(pd.read_csv("reports/rounds.csv")) == 1
    assert Path("reports/pseudo_labels.csv").read_text() == "round,clip_id,label,confidence,agreement,seed\n"


def test_selects_the_best_round(run):
    run_stages(rounds(rounds=3, select="best_cv"))
    table = pd.read_csv("reports/rounds.csv")
    best = int(table["waf_best_epoch"].to_numpy().argmax())
    chosen = load_file("models/self_training/predictions.safetensors")["votes"].mean(dim=1)
    test = torch.from_numpy(run.splits[run.others] == "test")
    expected = load_file("models/self_training/rounds.safetensors")["test_probabilities"][best]
    assert torch.equal(chosen[:, test], expected)


def test_agreement_is_reported(run):
    run_stages(rounds(agreement=2, rounds=1))
    labels = pd.read_csv("reports/pseudo_labels.csv")
    assert labels["agreement"].between(2, 3).all()


def test_agreement_beyond_the_modalities_is_refused(run):
    with pytest.raises(PipelineError, match=r"self_training.agreement: found 4, expected at most .*\(3\)"):
        run_stages(rounds(agreement=4))


def test_models_of_other_seeds_are_refused(run):
    run_stages(rounds(rounds=0))
    write_params(recipe(seeds=[1]), rounds())
    with pytest.raises(PipelineError, match="models/fusion: found models of other seeds"):
        stage.main()


@pytest.mark.parametrize("splits", [{"unlabelled": 0, "test": 0}, {"unlabelled": 0, "test": 9}])
def test_without_unlabelled_clips_round_0_stays_with_a_warning(tmp_path, monkeypatch, capsys, splits):
    inputs, _ = make_inputs(**splits)
    write_run(tmp_path, inputs)
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    run_stages(rounds(include_test=False))
    assert "warning: self_train: stopped after round 0 of 2" in capsys.readouterr().err
    assert len(pd.read_csv("reports/rounds.csv")) == 1
    votes = load_file("models/self_training/predictions.safetensors")["votes"]
    assert votes.shape == (2, 3, splits["test"], len(LABELS))
