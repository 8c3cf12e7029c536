"""Every architecture of stages/fusion: what architectures.py asks of each."""

import dataclasses
import importlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from fusion_data import make_inputs, recipe, tiled
from sklearn.metrics import f1_score

from stages.fusion import ensemble as ensemble_module
from stages.fusion.architectures import Architecture, Dropout
from stages.fusion.ensemble import Outputs, load_ensemble
from stages.fusion.features import Inputs, Standardised, fold_statistics
from stages.fusion.training import Training, fit, train

pytestmark = pytest.mark.usefixtures("one_thread")

FUSION = Path(__file__).parent.parent / "stages/fusion"
NAMES = sorted(path.stem for path in FUSION.glob("*.py")
               if hasattr(importlib.import_module(f"stages.fusion.{path.stem}"), "Model"))
WIDTHS, SEGMENTS = (12, 9, 6, 5), (3, 3, 2, 1)


def test_the_architectures_that_params_name() -> None:
    assert {"attention", "concatenation", "late", "lmf", "transformer", "frames"} <= set(NAMES)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(name: str, count: int = 3, **changes: float) -> torch.nn.Module:
    values = {"hidden": 16, "dropout": 0.3, "modality_dropout": 0.5, "keep_one": False} | changes
    torch.manual_seed(3)
    return Architecture(name, tuple("abcd"[:count]), WIDTHS[:count], 5, segments=SEGMENTS[:count], **values).build(
        torch.Generator().manual_seed(5))


def clips(present: torch.Tensor) -> list[torch.Tensor]:
    """Random features, zeros where absent, as Standardised gives them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(present), width, generator=generator) * present[:, i, None]
            for i, width in enumerate(WIDTHS[: present.shape[1]])]


def patterns(count: int) -> torch.Tensor:
    """Each pattern of presence once, all absent among them: (2^count, count) bool."""
    return torch.tensor(list(product([False, True], repeat=count)))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_modalities_and_any_absent(name: str, count: int) -> None:
    model, present = build(name, count), patterns(count).repeat(9, 1)
    features = clips(present)
    for training in (True, False):
        logits, scores = model.train(training)(features, present)
        assert logits.shape == (len(present), 5) and logits.isfinite().all()
        assert scores is None or (scores.shape == present.shape and scores.isfinite().all())
    model.train()(features, present)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_one_clip_is_as_in_a_batch(name: str) -> None:
    model, present = build(name).eval(), patterns(3)
    features = clips(present)
    together, scores = model(features, present)
    for i in range(len(present)):
        alone, own = model([x[i : i + 1] for x in features], present[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
        if scores is not None:
            torch.testing.assert_close(own[0], scores[i], rtol=1e-4, atol=1e-5)


def test_absent_is_dropped(name: str) -> None:
    """A modality that dropout drops gives what an absent one gives; nothing else tells them apart."""
    model = build(name, dropout=0.0).train()
    everything = torch.ones(40, 3, dtype=torch.bool)
    dropped, _ = model(clips(everything), everything)
    generator = torch.Generator().manual_seed(5)  # as the model's
    keep = torch.rand(everything.shape, generator=generator) < 0.5
    assert 30 < keep.sum() < 90
    absent, _ = model.eval()([x * keep[:, i, None] for i, x in enumerate(clips(everything))], keep)
    torch.testing.assert_close(dropped, absent, rtol=1e-5, atol=1e-6)


def test_randomness_is_the_generator_s_alone(name: str) -> None:
    present = torch.ones(30, 3, dtype=torch.bool)
    outputs = []
    for seed in (1, 2):
        model = build(name).train()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        outputs.append(model(clips(present), present)[0])
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model(clips(present), present)[0])  # the next draw differs
    assert any(isinstance(module, Dropout) for module in model.modules())


def in_segments(inputs: Inputs) -> Inputs:
    """As if the features of two of the modalities were those of parts of time."""
    parts = zip(inputs.modalities, (5, 7, 1), strict=True)
    return dataclasses.replace(inputs, modalities=tuple(dataclasses.replace(m, segments=n) for m, n in parts))


def trained(name: str, **changes: object) -> tuple[Inputs, np.ndarray, Outputs]:
    inputs, truth = make_inputs(labelled=100, unlabelled=60)
    inputs = in_segments(inputs)
    p = recipe(architecture=name, **changes)
    return inputs, truth, train(inputs, p, tiled(inputs, p), "test")


def test_learns(name: str) -> None:
    inputs, truth, outputs = trained(name, epochs=20, dropout=0.1)
    called = outputs.votes.mean(dim=1).argmax(dim=-1)
    assert min(f1_score(truth[inputs.others], one, average="weighted") for one in called) > 0.9


def test_a_model_among_others_equals_itself_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble_module, "cores", lambda: 3)
    p = recipe(architecture=name, epochs=2)
    inputs = in_segments(make_inputs()[0])
    labels, statistics = tiled(inputs, p), fold_statistics(inputs, p)
    feeds = [Standardised(inputs, statistics, fold) for fold in range(inputs.fold_count)]
    together = fit(inputs, p, labels, feeds, [(0, 0), (0, 1), (1, 2)], "test")
    alone = Training(inputs, p, labels[0, 1], feeds[1], p.seeds[0], 1)
    for _ in range(p.epochs):
        alone.run_epoch()
    assert all(torch.equal(together[1].kept.weights[key], values) for key, values in alone.kept.weights.items())


def test_saved_and_loaded_predicts_the_same_with_any_modality_removed(name: str, tmp_path: Path) -> None:
    inputs, _, outputs = trained(name, epochs=2)
    outputs.ensemble.save(tmp_path)
    loaded = load_ensemble(tmp_path)
    assert loaded.architecture == outputs.ensemble.architecture
    assert torch.equal(loaded.predict(inputs, inputs.others), outputs.votes)
    _, attention = loaded.predict_with_attention(inputs, inputs.others)
    assert attention.isnan().all() or attention.isfinite().all()
    removals = [frozenset(names) for names in (("face",), ("sound", "prompt"), ("sound", "face", "prompt"))]
    found = loaded.predict_without(inputs, inputs.others, removals)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:-1]))
    for removed, softmax in zip(removals, found, strict=True):
        blind = tuple(
            dataclasses.replace(m, present=torch.zeros_like(m.present), matrix=torch.zeros_like(m.matrix))
            if m.name in removed else m for m in inputs.modalities
        )
        without = dataclasses.replace(inputs, modalities=blind)
        torch.testing.assert_close(softmax, loaded.predict(without, inputs.others).mean(dim=1))


def test_late_fusion_is_the_mean_of_those_present() -> None:
    model, present = build("late").eval(), patterns(3)
    features = clips(present)
    alone = torch.stack([classifier(encoder(x)) for classifier, encoder, x
                         in zip(model.classifiers, model.encoders, features, strict=True)], dim=1)
    for i, here in enumerate(present):
        expected = alone[i, here].mean(dim=0) if here.any() else torch.zeros(5)
        torch.testing.assert_close(model(features, present)[0][i], expected)


def test_lmf_is_the_contraction_of_the_whole_tensor() -> None:
    """Equation 1 of the paper: the outer product of all encodings, each with a 1, times a weight tensor."""
    model, present = build("lmf").eval(), patterns(3)
    with torch.no_grad():
        model.ones.add_(0.3 * torch.randn(model.ones.shape))
    features = clips(present)
    ones = torch.ones(len(present), 1)
    a, b, c = (torch.cat([encoder(x) * present[:, i, None], ones], dim=1)
               for i, (encoder, x) in enumerate(zip(model.encoders, features, strict=True)))
    factors = torch.cat([model.factors, model.ones[:, :, None]], dim=2)  # (3, rank, hidden + 1, labels)
    whole = torch.einsum("r,ril,rjl,rkl->ijkl", model.weights, *factors)
    expected = torch.einsum("bi,bj,bk,ijkl->bl", a, b, c, whole) + model.bias
    torch.testing.assert_close(model(features, present)[0], expected, rtol=1e-4, atol=1e-4)


def test_transformer_layer_equals_torch_s_own() -> None:
    from stages.fusion.transformer import Layer

    torch.manual_seed(0)
    layer = Layer(16, 0.3, None).eval()
    own = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True).eval()
    own.load_state_dict({
        "self_attn.in_proj_weight": layer.projections.weight, "self_attn.in_proj_bias": layer.projections.bias,
        "self_attn.out_proj.weight": layer.output.weight, "self_attn.out_proj.bias": layer.output.bias,
        **{f"{name}.{kind}": getattr(getattr(layer, ours), kind) for kind in ("weight", "bias") for name, ours in
           (("linear1", "linear_1"), ("linear2", "linear_2"), ("norm1", "norm_1"), ("norm2", "norm_2"))},
    })
    tokens, visible = torch.randn(8, 4, 16), torch.cat([torch.ones(8, 1, dtype=torch.bool), patterns(3)], dim=1)
    found, weights = layer(tokens, visible)
    torch.testing.assert_close(found, own(tokens, src_key_padding_mask=~visible), rtol=1e-4, atol=1e-5)
    assert not weights.masked_select(~visible[:, None, None]).any()  # nobody attends to what is absent
