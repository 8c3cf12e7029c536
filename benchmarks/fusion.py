"""What training the fusion costs at MER2024's size, on random features of the published dimensions.

    python -m benchmarks.fusion                     # five folds on 5,030 clips, beside a loop of the baseline's kind
    python -m benchmarks.fusion --whole --seeds 1   # all of self-training: 10 rounds with 115,595 unlabelled clips

The loop of the baseline's kind: one fold after another; a torch DataLoader with a collate over per-clip arrays, batch
64; logits and loss brought to the host at every step. It has neither modality dropout nor standardisation, ours has
both. The two alternate, five epochs of all folds at a time (five models share two cores evenly over epochs, not within
one), and the median of the ratios is printed. The baseline also predicts all unlabelled clips after every epoch: this
is timed once, with one fold's model, and five times the result is added to its side.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stages.engine.devices import pick_device, set_threads
from stages.engine.params import Fusion, SelfTraining
from stages.fusion.features import Inputs, Modality, fold_statistics
from stages.fusion.self_training import self_train
from stages.fusion.training import fit, train

LABELS = ("neutral", "anger", "happiness", "sadness", "worry", "surprise")
DIMENSIONS = {"hubert": 2048, "clip": 1536, "emovclip": 768, "baichuan": 10240}
PER_FOLD = "emovclip"
LABELLED, UNLABELLED, FOLDS = 5030, 115_595, 5
EPOCHS = 30
TURN = 5  # epochs of one side before the other's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--whole", action="store_true", help="time self-training instead")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer for a quick look")
    options = parser.parse_args()
    device = pick_device(options.device)
    set_threads(False)
    fusion = Fusion(
        modalities=list(DIMENSIONS), standardize=True, modality_dropout=0.3, keep_one=True, hidden=128, dropout=0.3,
        epochs=options.epochs, batch_size=64, learning_rate=3e-4, weight_decay=0.0, seeds=list(range(options.seeds)),
        missing="off",
    )
    print(f"{len(os.sched_getaffinity(0))} CPU cores, {device}")
    if options.whole:
        whole(fusion, options.rounds, device)
    else:
        beside_the_baseline(fusion, device)
    print(f"peak host memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def whole(fusion: Fusion, rounds: int, device: str) -> None:
    """Round 0 and the rounds after it, as train_fusion and self_train run them."""
    inputs = random_inputs(UNLABELLED, torch.float16, device)
    p = SelfTraining(rounds=rounds, k=10, pool="accumulate", agreement=0, include_test=True, select="last")
    start = time.perf_counter()
    first = train(inputs, fusion, np.tile(inputs.labels, (len(fusion.seeds), 1)), "round 0")
    before = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = sum(1 for _ in self_train(inputs, fusion, p, first, Path(folder))) - 1
    end = time.perf_counter()
    print(f"{len(fusion.seeds)} seeds x {FOLDS} folds x {fusion.epochs} epochs, {UNLABELLED} unlabelled: round 0 "
          f"{before - start:.0f} s, self-training ({done} rounds) {end - before:.0f} s")


def beside_the_baseline(fusion: Fusion, device: str) -> None:
    inputs = random_inputs(0, torch.float32, device)
    recipe = fusion.model_copy(update={"epochs": TURN, "seeds": [0]})
    statistics_ = fold_statistics(inputs, True)
    models = [(0, fold) for fold in range(FOLDS)]

    def ours() -> None:
        fit(inputs, recipe, inputs.labels[None], statistics_, models, "ours")

    def loop() -> None:
        for _ in range(TURN):
            baseline.epoch()

    baseline = Baseline(inputs, recipe, device)
    ours()  # warm up
    baseline.epoch()
    turns = max(1, fusion.epochs // TURN)
    pairs = [(seconds(ours) / TURN, seconds(loop) / TURN) for _ in range(turns)]
    predicting = FOLDS * seconds(baseline.predict)
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{FOLDS} folds, {LABELLED} clips, an epoch: ours {mine:.2f} s, the baseline's loop {theirs:.2f} s; "
          f"for {EPOCHS} epochs {EPOCHS * mine:.0f} and {EPOCHS * theirs:.0f} s")
    print(f"ratio {statistics.median(b / a for a, b in pairs):.2f}; with the unlabelled clips predicted every epoch "
          f"({predicting:.0f} s): {(theirs + predicting) / mine:.1f}")


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def random_inputs(unlabelled: int, dtype: torch.dtype, device: str) -> Inputs:
    """Gaussian features in which the class shows a little, made block by block: no copy beside the matrices."""
    count = LABELLED + unlabelled
    rng = np.random.default_rng(0)
    truth = rng.integers(0, len(LABELS), count)
    is_labelled = np.arange(count) < LABELLED
    folds = np.where(is_labelled, rng.integers(0, FOLDS, count), -1)
    modalities = []
    for name, dimension in DIMENSIONS.items():
        groups = FOLDS if name == PER_FOLD else 1
        matrix = torch.empty(groups, count, dimension, dtype=dtype)
        means = torch.from_numpy(rng.normal(0, 0.05, (len(LABELS), dimension)).astype(np.float32))
        generator = torch.Generator().manual_seed(0)
        for start in range(0, count, 4096):
            block = means[truth[start : start + 4096]]
            matrix[:, start : start + 4096] = block + torch.randn(block.shape, generator=generator)
        present = torch.from_numpy(rng.random(count) < 0.97)
        matrix *= present[None, :, None]
        zeros, ones = torch.zeros(groups, dimension), torch.ones(groups, dimension)
        modalities.append(Modality(name, *(t.to(device) for t in (matrix, zeros, ones, present))))
    splits = np.where(is_labelled, "labelled", "unlabelled")
    return Inputs([f"clip_{i}" for i in range(count)], splits, np.where(is_labelled, truth, -1), folds, LABELS,
                  tuple(modalities))


class Baseline:
    """The official baseline's kind of training loop around the same attention model."""

    def __init__(self, inputs: Inputs, recipe: Fusion, device: str):
        self.device = device
        arrays = [modality.matrix[0].cpu().numpy() for modality in inputs.modalities]
        clips = [([array[i].copy() for array in arrays], int(inputs.labels[i])) for i in range(LABELLED)]
        self.unlabelled = [([x.copy() for x in clips[i % LABELLED][0]], -1) for i in range(UNLABELLED)]
        self.folds = []
        for fold in range(FOLDS):
            model = Attention(list(DIMENSIONS.values()), recipe.hidden, recipe.dropout).to(device)
            parts = ([clips[i] for i in np.flatnonzero(inputs.folds != fold)],
                     [clips[i] for i in np.flatnonzero(inputs.folds == fold)])
            loaders = [self.loader(part, shuffle) for part, shuffle in zip(parts, (True, False), strict=True)]
            self.folds.append((model, torch.optim.Adam(model.parameters(), lr=recipe.learning_rate), loaders))

    def loader(self, clips: Sequence[Any], shuffle: bool) -> DataLoader[Any]:
        return DataLoader(clips, 64, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]

    def epoch(self) -> None:
        """Train and validate every fold once."""
        for model, adam, (training, validation) in self.folds:
            model.train()
            for features, labels in training:
                adam.zero_grad()
                scores = model([x.to(self.device) for x in features])
                loss = nn.functional.cross_entropy(scores, labels.to(self.device))
                scores.detach().cpu().numpy(), loss.item()
                loss.backward()
                adam.step()
            run(model, validation, self.device)

    def predict(self) -> None:
        """One fold's model over the unlabelled clips."""
        run(self.folds[0][0], self.loader(self.unlabelled, False), self.device)


def run(model: nn.Module, loader: DataLoader[Any], device: str) -> None:
    model.eval()
    with torch.no_grad():
        for features, _ in loader:
            model([x.to(device) for x in features]).cpu().numpy()


def collate(clips: list[tuple[list[np.ndarray], int]]) -> tuple[list[Tensor], Tensor]:
    features = [torch.from_numpy(np.array(column)) for column in zip(*(arrays for arrays, _ in clips), strict=True)]
    return features, torch.tensor([label for _, label in clips])


class Attention(nn.Module):
    """One attention fusion as plain modules."""

    def __init__(self, dimensions: Sequence[int], hidden: int, dropout: float):
        super().__init__()

        def encoder(width: int) -> nn.Module:
            layers: list[nn.Module] = [nn.Dropout(dropout)]
            for inputs in (width, hidden, hidden):
                layers += [nn.Linear(inputs, hidden), nn.ReLU()]
            return nn.Sequential(*layers)

        self.encoders = nn.ModuleList(encoder(width) for width in dimensions)
        self.attention = encoder(hidden * len(dimensions))
        self.scores, self.classifier = nn.Linear(hidden, len(dimensions)), nn.Linear(hidden, len(LABELS))

    def forward(self, features: list[Tensor]) -> Tensor:
        encodings = [encode(x) for encode, x in zip(self.encoders, features, strict=True)]
        scores = self.scores(self.attention(torch.cat(encodings, dim=1)))
        return self.classifier((torch.stack(encodings, dim=2) @ scores.unsqueeze(2)).squeeze(2))


if __name__ == "__main__":
    main()
