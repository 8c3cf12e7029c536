"""Training [paper 4.1]: every fold's and seed's model in a plain loop; on a CPU several side by side, one per core.

Models never meet: each has its own weights, order of clips, dropout and optimiser, drawn from (seed, fold) alone, and
is computed by one thread. So a model comes out to the same bits alone and among others, whatever the number of cores.

Per model the epoch with the best validation WAF is kept; ties go to the earlier epoch.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from stages.engine.devices import lanes
from stages.engine.params import Fusion
from stages.evaluation import metrics
from stages.fusion.architectures import Architecture
from stages.fusion.ensemble import Ensemble, Outputs, lane_count
from stages.fusion.features import Inputs, Standardised, Statistics, fold_statistics
from stages.fusion.pretrained import Pretrained


def train(
    inputs: Inputs, recipe: Fusion, labels: np.ndarray, name: str, start: Pretrained | None = None
) -> Outputs:
    """Train len(recipe.seeds) x folds models on `inputs` with its modalities; the ensemble of each model at its best
    epoch then predicts the unlabelled and test clips, once.

    labels: (S, N) int64, the class that seed s learns for each clip, -1 for none: the labelled clips' classes,
    and pseudo-labels. name: what the progress bar shows. start: what the encoders start from.
    """
    shape = (len(recipe.seeds), inputs.fold_count)
    models = list(np.ndindex(*shape))
    statistics = fold_statistics(inputs, recipe.standardize)
    trainings = fit(inputs, recipe, labels, statistics, models, name, start)
    best, last = (torch.empty(shape[0], len(inputs.labels), len(inputs.label_names)) for _ in range(2))
    for (s, _), training in zip(models, trainings, strict=True):
        best[s, training.valid], last[s, training.valid] = training.best_softmax, training.softmax
    weights = {name: torch.stack([training.best[name] for training in trainings]).unflatten(0, shape).cpu()
               for name in trainings[0].best}
    ensemble = Ensemble(
        architecture_of(inputs, recipe),
        inputs.label_names,
        tuple(recipe.seeds),
        weights,
        {key: (mean.cpu(), scale.cpu()) for key, (mean, scale) in statistics.items()},
        {modality.name: modality.source for modality in inputs.modalities},
    )
    curves = torch.stack([torch.tensor(training.curve) for training in trainings]).unflatten(0, shape)
    votes, rows = ensemble.predict(inputs, inputs.others), inputs.labelled
    return Outputs(ensemble, best[:, rows], last[:, rows], votes, curves)


def architecture_of(inputs: Inputs, recipe: Fusion) -> Architecture:
    """The model for these modalities and labels."""
    names, dimensions = tuple(m.name for m in inputs.modalities), tuple(m.dimension for m in inputs.modalities)
    return Architecture(recipe.architecture, names, dimensions, len(inputs.label_names), recipe.hidden, recipe.dropout,
                        recipe.modality_dropout, recipe.keep_one, tuple(m.segments for m in inputs.modalities))


def fit(
    inputs: Inputs,
    recipe: Fusion,
    labels: np.ndarray,
    statistics: Statistics,
    models: Sequence[tuple[int, int]],
    name: str,
    start: Pretrained | None = None,
) -> list["Training"]:
    """Train the models (position of the seed, fold), epoch by epoch in turns, so that five keep two cores busy."""
    feeds = [Standardised(inputs, statistics, fold) for fold in range(inputs.fold_count)]
    trainings = [Training(inputs, recipe, labels[s], feeds[fold], recipe.seeds[s], fold, start)
                 for s, fold in models]
    in_turns(trainings, recipe.epochs, inputs.device, name)
    return trainings


class Epochs(Protocol):
    """A model that is trained epoch by epoch."""

    def run_epoch(self) -> None: ...


def in_turns(models: Sequence[Epochs], epochs: int, device: torch.device, name: str) -> None:
    """Run every model's epochs, on a CPU side by side; name: what the progress bar shows."""
    turns = epochs * list(models)
    with (
        tqdm(total=len(turns), desc=name, unit="epoch", mininterval=1, leave=False) as bar,
        lanes(lane_count(device, len(models))) as pool,
    ):
        tasks = [pool.submit(model.run_epoch) for model in turns]
        try:
            for task in tasks:
                task.result()
                bar.update()
        finally:  # after an error, or Ctrl-C, the others need not go on
            for task in tasks:
                task.cancel()


class Training:
    """One model, trained epoch by epoch.

    It learns from every clip with a label that is not in its fold, and is validated on its fold. A pseudo-labelled
    clip is in no fold: it is learned from, never validated on.
    """

    def __init__(
        self, inputs: Inputs, recipe: Fusion, labels: np.ndarray, feed: Standardised, seed: int, fold: int,
        start: Pretrained | None = None,
    ):
        device = inputs.device
        words = np.random.SeedSequence(seed, spawn_key=(fold,)).generate_state(3)
        initial, order, dropout = (int(word) for word in words)
        self.order = torch.Generator().manual_seed(order)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(initial)
            self.model = architecture_of(inputs, recipe).build(torch.Generator(device).manual_seed(dropout)).to(device)
        if start:
            start.start(self.model, [modality.name for modality in inputs.modalities], seed, fold)
        self.adam = torch.optim.Adam(self.model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay,
                                     fused=True)
        self.feed, self.batch, self.lock = feed, recipe.batch_size, Lock()
        self.classes = torch.from_numpy(labels).to(device)
        self.rows = torch.from_numpy(np.flatnonzero((labels >= 0) & (inputs.folds != fold)))
        self.valid = torch.from_numpy(np.flatnonzero(inputs.folds == fold))
        self.best: dict[str, Tensor] = {}
        self.best_waf = -1.0
        self.curve: list[tuple[float, float, float]] = []  # per epoch train_loss, valid_loss, valid_waf in percent

    def run_epoch(self) -> None:
        """Train on every clip once, validate, and keep the model if it is the best so far."""
        with self.lock:  # where there are fewer models than cores, the next epoch waits for this one
            loss = self._learn()
            logits = self._validate()
            self.softmax = logits.softmax(dim=-1)
            actual = self.classes.cpu()[self.valid]
            waf = float(metrics.waf(actual, self.softmax.argmax(dim=-1), logits.shape[-1]))
            self.curve.append((loss, float(cross_entropy(logits, actual)), waf))
            if waf > self.best_waf:
                self.best_waf, self.best_softmax = waf, self.softmax
                self.best = {name: values.clone() for name, values in self.model.state_dict().items()}

    def _learn(self) -> float:
        """One pass over the training part in a new order; the mean loss."""
        self.model.train()
        total = torch.zeros((), device=self.classes.device)
        shuffled = self.rows[torch.randperm(len(self.rows), generator=self.order)].to(total.device)
        for rows in shuffled.split(self.batch):
            logits, _ = self.model(*self.feed(rows))
            loss = cross_entropy(logits, self.classes[rows])
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            total += loss.detach() * len(rows)  # read once an epoch: reading makes a GPU wait
        return float(total) / len(self.rows)

    @torch.inference_mode()
    def _validate(self) -> Tensor:
        """Logits of the validation part, (V, L), on the CPU."""
        self.model.eval()
        rows = self.valid.to(self.classes.device)
        return torch.cat([self.model(*self.feed(block))[0] for block in rows.split(1024)]).cpu()
