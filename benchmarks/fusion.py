"""What training the fusion costs at MER2024's size, on random features of the published dimensions.

    python -m benchmarks.fusion                     # five folds on 5,030 clips, beside a loop of the baseline's kind
    python -m benchmarks.fusion --engines           # three ways to run five folds, on a quiet machine with git
    python -m benchmarks.fusion --whole --seeds 1   # all of self-training: 10 rounds with 115,595 unlabelled clips

The loop of the baseline's kind: one fold after another; a torch DataLoader with a collate over per-clip arrays, batch
64; logits and loss brought to the host at every step. It has neither modality dropout nor standardisation, ours has
both. The two alternate, five epochs of all folds at a time (five models share two cores evenly over epochs, not within
one), and the median of the ratios is printed. Its habit of predicting all unlabelled clips after every epoch is timed
once, with one fold's model, and five times that is added to its side.

--engines: the loop that stages/fusion/training.py is; the batched code that it replaced, from git (BATCHED); and
torch.func.stack_module_state with vmap over the same module, without the dropout before the attention, in a group of
folds per core. Each runs in a process of its own; they take turns.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stages.engine.devices import cores, lanes, pick_device, set_threads
from stages.engine.params import Fusion, Params, SelfTraining, load
from stages.fusion.architectures import Dropout, keep_modalities
from stages.fusion.features import Inputs, Modality, Standardised, fold_statistics
from stages.fusion.self_training import pool_rows, self_train
from stages.fusion.training import architecture_of, fit, train

ROOT = Path(__file__).parent.parent
LABELS = ("neutral", "anger", "happiness", "sadness", "worry", "surprise")
DIMENSIONS = {"hubert": 2048, "clip": 1536, "emovclip": 768, "baichuan": 10240}
PER_FOLD = "emovclip"
LABELLED, UNLABELLED, FOLDS = 5030, 115_595, 5
EPOCHS = 30
TURN = 5  # epochs of one side before the other's
BATCHED = "31166a6"  # the last commit whose models were one batched model
WORKER = """
import sys
from benchmarks import fusion
from stages.engine.devices import set_threads
from stages.engine.params import Fusion
engine, epochs = sys.argv[1], int(sys.argv[2])
set_threads(engine != "batched")
recipe = fusion.paper(epochs=epochs, seeds=[0]).fusion if engine != "batched" else Fusion(
    modalities=list(fusion.DIMENSIONS), modality_dropout=0.3, keep_one=True, hidden=128, dropout=0.3, epochs=epochs,
    batch_size=64, learning_rate=3e-4, weight_decay=1e-5, seeds=[0], missing="off", standardize=True)
inputs = fusion.random_inputs(0, fusion.torch.float32, "cpu")
statistics = fusion.fold_statistics(inputs, True if engine == "batched" else recipe)
models = [(0, fold) for fold in range(fusion.FOLDS)]
feeds = statistics if engine == "batched" else [
    fusion.Standardised(inputs, statistics, fold) for fold in range(fusion.FOLDS)]
labels = inputs.labels[None] if engine == "batched" else fusion.np.tile(inputs.labels, (1, fusion.FOLDS, 1))
groups = fusion.groups_of_folds(inputs, recipe) if engine == "vmap" else []
def turn():
    if groups:
        fusion.run_groups(groups)
    else:
        fusion.fit(inputs, recipe, labels, feeds, models, engine)
for _ in sys.stdin:  # a line is a turn
    print(fusion.seconds(turn) / epochs, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engines", action="store_true", help="time ways to run the folds instead")
    parser.add_argument("--turns", type=int, default=5, help="of each engine, two epochs each")
    parser.add_argument("--whole", action="store_true", help="time self-training instead")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer for a quick look")
    options = parser.parse_args()
    if options.engines:
        return engines(options.turns)
    device = pick_device(options.device)
    set_threads(options.whole)  # as the stages do; beside them the loop has all cores
    p = paper(epochs=options.epochs, seeds=list(range(options.seeds)))
    print(f"{len(os.sched_getaffinity(0))} CPU cores, {device}")
    if options.whole:
        whole(p.fusion, p.self_training.model_copy(update={"rounds": options.rounds}), device)
    else:
        beside_the_baseline(p.fusion, device)
    print(f"peak host memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def paper(**changes: Any) -> Params:
    """The preset's recipe, with changes to its fusion."""
    p = load(ROOT / "presets/mer2024.yaml")
    return p.model_copy(update={"fusion": p.fusion.model_copy(update=changes)})


def engines(turns: int, epochs: int = 2) -> None:
    """Print each engine's seconds per epoch of five folds, turn by turn, and the medians of its ratios to `batched`."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", BATCHED, "stages", "benchmarks"], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        command = [sys.executable, "-c", WORKER]
        workers = {
            name: subprocess.Popen([*command, name, str(epochs)], cwd=folder if name == "batched" else None, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for name in ("batched", "vmap", "loop")
        }
        rows = []
        for turn in range(turns + 1):
            row = {}
            for name, worker in workers.items():
                assert worker.stdin and worker.stdout
                worker.stdin.write("\n")
                worker.stdin.flush()
                row[name] = float(worker.stdout.readline())
            if turn:  # the first warms up
                rows.append(row)
                print("  ".join(f"{name} {figure:.2f} s" for name, figure in row.items()), flush=True)
        for worker in workers.values():
            worker.communicate()
    for name in workers:
        ratio = statistics.median(row[name] / row["batched"] for row in rows)
        print(f"{name}: median {statistics.median(row[name] for row in rows):.2f} s an epoch, {ratio:.2f} of batched")


def whole(fusion: Fusion, p: SelfTraining, device: str) -> None:
    """Round 0 and the rounds after it, as train_fusion and self_train run them."""
    inputs = random_inputs(UNLABELLED, torch.float16, device)
    start = time.perf_counter()
    first = train(inputs, fusion, np.tile(inputs.labels, (len(fusion.seeds), FOLDS, 1)), "round 0")
    before = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = sum(1 for _ in self_train(inputs, fusion, p, pool_rows(inputs, True), first, Path(folder))) - 1
    end = time.perf_counter()
    print(f"{len(fusion.seeds)} seeds x {FOLDS} folds x {fusion.epochs} epochs, {UNLABELLED} unlabelled: round 0 "
          f"{before - start:.0f} s, self-training ({done} rounds) {end - before:.0f} s")


def beside_the_baseline(fusion: Fusion, device: str) -> None:
    inputs = random_inputs(0, torch.float32, device)
    recipe = fusion.model_copy(update={"epochs": TURN, "seeds": [0]})
    statistics_ = fold_statistics(inputs, recipe)
    feeds = [Standardised(inputs, statistics_, fold) for fold in range(FOLDS)]
    models = [(0, fold) for fold in range(FOLDS)]

    def ours() -> None:
        fit(inputs, recipe, np.tile(inputs.labels, (1, FOLDS, 1)), feeds, models, "ours")

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


def groups_of_folds(inputs: Inputs, recipe: Fusion) -> list["Vmapped"]:
    """One group per core."""
    parts = np.array_split(range(FOLDS), min(cores(), FOLDS))
    return [Vmapped(inputs, recipe, part.tolist()) for part in parts]


def run_groups(groups: Sequence["Vmapped"]) -> None:
    with lanes(len(groups)) as pool:
        list(pool.map(Vmapped.run, groups))


class Vmapped:
    """Several folds' models as one: torch.func over the module, all of them in every operation."""

    def __init__(self, inputs: Inputs, recipe: Fusion, folds: Sequence[int]):
        self.inputs, self.recipe = inputs, recipe
        self.architecture, self.generator = architecture_of(inputs, recipe), torch.Generator().manual_seed(0)
        models = [self.architecture.build().eval() for _ in folds]  # vmap knows no generator per model: what
        # is dropped is drawn outside
        self.model, self.dropout = models[0], Dropout(recipe.dropout, self.generator)
        self.parameters, _ = torch.func.stack_module_state(models)
        self.adam = torch.optim.Adam(list(self.parameters.values()), recipe.learning_rate, fused=True)
        standardised = fold_statistics(inputs, recipe)
        self.feeds = [Standardised(inputs, standardised, fold) for fold in folds]
        self.rows = [torch.from_numpy(np.flatnonzero(inputs.folds != fold)) for fold in folds]
        self.valid = [torch.from_numpy(np.flatnonzero(inputs.folds == fold)) for fold in folds]
        self.classes = torch.from_numpy(inputs.labels)

    def logits(self, parameters: dict[str, Tensor], features: list[Tensor], present: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, parameters, (features, present))[0]

    def run(self) -> None:
        steps = min(len(rows) for rows in self.rows) // self.recipe.batch_size
        for _ in range(self.recipe.epochs):
            orders = [rows[torch.randperm(len(rows))] for rows in self.rows]
            for step in range(steps):
                part = slice(step * self.recipe.batch_size, (step + 1) * self.recipe.batch_size)
                self.step([order[part] for order in orders])
            longest = min(len(rows) for rows in self.valid)
            with torch.no_grad():
                torch.func.vmap(self.logits)(self.parameters, *self.stacked([rows[:longest] for rows in self.valid]))

    def stacked(self, rows: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        fed = [feed(chosen) for feed, chosen in zip(self.feeds, rows, strict=True)]
        features = [torch.stack(column) for column in zip(*(part for part, _ in fed), strict=True)]
        return features, torch.stack([present for _, present in fed])

    def step(self, rows: list[Tensor]) -> None:
        features, present = self.stacked(rows)
        keep = keep_modalities(present.flatten(0, 1), self.architecture, self.generator).view_as(present)
        dropped = [self.dropout(x * keep[..., i, None]) for i, x in enumerate(features)]
        logits = torch.func.vmap(self.logits)(self.parameters, dropped, present)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), self.classes[torch.cat(rows)])
        self.adam.zero_grad()
        (loss * len(rows)).backward()
        self.adam.step()


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
