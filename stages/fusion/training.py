"""Training [paper 4.1]: every fold's and seed's model in a plain loop; on a CPU several side by side, one per core.

Models never meet: each has its own weights, order of clips, dropout and optimiser, drawn from (seed, fold) alone, and
is computed by one thread. So a model comes out to the same bits alone and among others, whatever the number of cores.

epoch: best     each model at its own best epoch on its validation part, ties to the earlier [paper]
       common   all folds of a seed at the one epoch with the best mean validation WAF, ties to the earlier [choice]
       last     all at the last one
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import fsum
from threading import Lock
from typing import NamedTuple, Protocol

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
from stages.fusion.features import (
    Inputs,
    Standardised,
    Statistics,
    fold_statistics,
    group_of_digest,
    group_statistics,
)
from stages.fusion.pretrained import Pretrained


def train(
    inputs: Inputs, recipe: Fusion, labels: np.ndarray, name: str, votes_last: bool = False,
    start: Pretrained | None = None,
) -> Outputs:
    """Train len(recipe.seeds) x folds models on `inputs` with its modalities; the ensemble of each model at the epoch
    that recipe.epoch asks for then predicts the unlabelled and test clips, once.

    labels: (S, F, N) int64, the class that seed s's model of fold f learns for each clip, -1 for none: the labelled
    clips' classes, and pseudo-labels. name: what the progress bar shows. votes_last: predict with the last epoch's
    models too, as self_training.voters: fold needs it. start: what the encoders start from.
    """
    shape = (len(recipe.seeds), inputs.fold_count)
    models = list(np.ndindex(*shape))
    statistics, groups = fold_statistics(inputs, recipe), group_statistics(inputs, recipe.by_group)
    feeds = [Standardised(inputs, statistics, fold, groups) for fold in range(inputs.fold_count)]
    trainings = fit(inputs, recipe, labels, feeds, models, name, start)
    best, last, own = (torch.empty(shape[0], len(inputs.labels), len(inputs.label_names)) for _ in range(3))
    for (s, _), training in zip(models, trainings, strict=True):
        best[s, training.valid], last[s, training.valid] = training.best_softmax, training.softmax
        own[s, training.valid] = training.kept.softmax
    ensemble = Ensemble(
        architecture_of(inputs, recipe),
        inputs.label_names,
        tuple(recipe.seeds),
        _stack([training.kept.weights for training in trainings], shape),
        on_cpu(statistics),
        {modality.name: modality.source for modality in inputs.modalities},
        recipe.epoch,
        np.reshape([training.kept.epoch for training in trainings], shape).tolist(),
        on_cpu(groups),
        group_of_digest(inputs) if groups else {},
    )
    curves = torch.stack([torch.tensor(training.curve) for training in trainings]).unflatten(0, shape)
    votes, rows = ensemble.predict(inputs, inputs.others), inputs.labelled
    last_epoch = replace(ensemble, weights=_stack([training.model.state_dict() for training in trainings], shape))
    at_last = last_epoch.predict(inputs, inputs.others if votes_last else inputs.others[:0])
    return Outputs(ensemble, best[:, rows], last[:, rows], own[:, rows], votes, at_last, curves)


def _stack(states: Sequence[dict[str, Tensor]], shape: tuple[int, int]) -> dict[str, Tensor]:
    """The state dicts of S x F models as one, on the CPU: (S, F, ...) per weight."""
    return {name: torch.stack([state[name] for state in states]).unflatten(0, shape).cpu() for name in states[0]}


def on_cpu(statistics: Statistics) -> Statistics:
    return {name: (mean.cpu(), scale.cpu()) for name, (mean, scale) in statistics.items()}


def architecture_of(inputs: Inputs, recipe: Fusion) -> Architecture:
    """The model for these modalities and labels."""
    names, dimensions = tuple(m.name for m in inputs.modalities), tuple(m.dimension for m in inputs.modalities)
    return Architecture(recipe.architecture, names, dimensions, len(inputs.label_names), recipe.hidden, recipe.dropout,
                        recipe.modality_dropout, recipe.keep_one, tuple(m.segments for m in inputs.modalities))


def fit(
    inputs: Inputs,
    recipe: Fusion,
    labels: np.ndarray,
    feeds: Sequence[Standardised],
    models: Sequence[tuple[int, int]],
    name: str,
    start: Pretrained | None = None,
) -> list["Training"]:
    """Train the models (position of the seed, fold), epoch by epoch in turns, so that five keep two cores busy.

    feeds: what the models of each fold are fed. With recipe.epoch `common` the models of one seed share an epoch.
    """
    trainings = [Training(inputs, recipe, labels[s, fold], feeds[fold], recipe.seeds[s], fold, start)
                 for s, fold in models]
    if recipe.epoch == "common":
        for seed in {s for s, _ in models}:
            share_epoch([training for (s, _), training in zip(models, trainings, strict=True) if s == seed])
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


class Kept(NamedTuple):
    """A model as it was after an epoch."""

    epoch: int  # from 1
    weights: dict[str, Tensor]
    softmax: Tensor  # (V, L) of its validation part, CPU


class Choice:
    """Which epoch a group of models keeps: the one with the best mean validation WAF, ties to the earlier.

    A model that is ahead of the others waits for none of them: what it was like is kept until all have come as far,
    and no longer than the epoch can still become the best. A group of one keeps its own best epoch.
    """

    def __init__(self, size: int):
        self.size, self.lock, self.waf = size, Lock(), -1.0
        self.wafs: dict[int, list[float]] = defaultdict(list)  # by epoch, of the models that have finished it
        self.pending: dict[int, dict[Training, Kept]] = defaultdict(dict)

    def offer(self, model: "Training", waf: float) -> None:
        """`model` has finished an epoch with this WAF, in percent; its weights are copied if they may be wanted."""
        epoch = len(model.curve)
        with self.lock:
            found = self.wafs[epoch]
            found.append(waf)
            missing = self.size - len(found)
            possible = fsum([*found, 100.0 * missing]) / self.size  # fsum: whichever model came first
            if possible > self.waf:
                weights = {name: values.clone() for name, values in model.model.state_dict().items()}
                self.pending[epoch][model] = Kept(epoch, weights, model.softmax)
            else:
                self.pending.pop(epoch, None)
            if not missing:
                for member, kept in self.pending.pop(epoch, {}).items():
                    member.kept, self.waf = kept, possible
                del self.wafs[epoch]


def share_epoch(trainings: Sequence["Training"]) -> None:
    """Let these models, which have not begun, keep one epoch that all of them share."""
    choice = Choice(len(trainings))
    for training in trainings:
        training.choice = choice


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
        words = np.random.SeedSequence(seed, spawn_key=(fold,)).generate_state(5)  # the first three as without the rest
        initial, order, dropout, noise, mixing = (int(word) for word in words)
        self.order = torch.Generator().manual_seed(order)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(initial)
            self.model = architecture_of(inputs, recipe).build(torch.Generator(device).manual_seed(dropout)).to(device)
        if start:
            start.start(self.model, [modality.name for modality in inputs.modalities], seed, fold)
        optimizer = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = optimizer(self.model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay,
                                   fused=True)
        self.feed, self.batch, self.lock = feed, recipe.batch_size, Lock()
        self.classes = torch.from_numpy(labels).to(device)
        self.rows = torch.from_numpy(np.flatnonzero((labels >= 0) & (inputs.folds != fold)))
        self.valid = torch.from_numpy(np.flatnonzero(inputs.folds == fold))
        self.noise = (recipe.feature_noise, torch.Generator(device).manual_seed(noise))
        self.mixup = (recipe.mixup, np.random.default_rng(mixing))
        self.smoothing, self.weights = recipe.label_smoothing, None
        if recipe.class_weights == "balanced":
            counts = torch.bincount(torch.from_numpy(labels)[self.rows], minlength=len(inputs.label_names))
            self.weights = (len(self.rows) / (len(counts) * counts.clamp(min=1))).to(device)
        self.last = recipe.epochs if recipe.epoch == "last" else 0  # 0: `choice` decides what is kept
        self.choice, self.kept = Choice(1), Kept(0, {}, torch.empty(0))
        self.best_waf, self.best_softmax = -1.0, torch.empty(0)
        self.curve: list[tuple[float, float, float]] = []  # per epoch train_loss, valid_loss, valid_waf in percent

    def run_epoch(self) -> None:
        """Train on every clip once, validate, and keep the model if this is the epoch to keep so far."""
        with self.lock:  # where there are fewer models than cores, the next epoch waits for this one
            loss = self._learn()
            logits = self._validate()
            self.softmax = logits.softmax(dim=-1)
            actual = self.classes.cpu()[self.valid]
            waf = float(metrics.waf(actual, self.softmax.argmax(dim=-1), logits.shape[-1]))
            self.curve.append((loss, float(cross_entropy(logits, actual)), waf))
            if waf > self.best_waf:
                self.best_waf, self.best_softmax = waf, self.softmax
            if not self.last:
                self.choice.offer(self, waf)
            elif len(self.curve) == self.last:
                self.kept = Kept(self.last, self.model.state_dict(), self.softmax)

    def _learn(self) -> float:
        """One pass over the training part in a new order; the mean loss."""
        self.model.train()
        total = torch.zeros((), device=self.classes.device)
        shuffled = self.rows[torch.randperm(len(self.rows), generator=self.order)].to(total.device)
        for rows in shuffled.split(self.batch):
            loss = self.train_loss(*self.feed(rows), self.classes[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach() * len(rows)  # read once an epoch: reading makes a GPU wait
        return float(total) / len(self.rows)

    def train_loss(self, features: list[Tensor], present: Tensor, classes: Tensor) -> Tensor:
        """The batch's loss, after noise and mixup on its features, (B, D) each; `features` may be overwritten.

        Mixup (Zhang et al. 2018): every clip is mixed with another of the batch, features and label distributions
        alike, by one share per batch; the loss is linear in the distribution, so the losses are mixed. An absent
        modality counts as the average clip, and the mixture has it if either has.
        """
        deviation, generator = self.noise
        if deviation:
            for i, x in enumerate(features):
                noise = torch.randn(x.shape, device=x.device, generator=generator)
                x.add_(noise.mul_(present[:, i, None]), alpha=deviation)
        alpha, mixing = self.mixup
        if not alpha:
            return self._cross_entropy(self.model(features, present)[0], classes)
        share, other = float(mixing.beta(alpha, alpha)), torch.from_numpy(mixing.permutation(len(classes)))
        other = other.to(classes.device)
        logits, _ = self.model([x[other].lerp(x, share) for x in features], present | present[other])
        return (share * self._cross_entropy(logits, classes)
                + (1 - share) * self._cross_entropy(logits, classes[other]))

    def _cross_entropy(self, logits: Tensor, classes: Tensor) -> Tensor:
        return cross_entropy(logits, classes, weight=self.weights, label_smoothing=self.smoothing)

    @torch.inference_mode()
    def _validate(self) -> Tensor:
        """Logits of the validation part, (V, L), on the CPU."""
        self.model.eval()
        rows = self.valid.to(self.classes.device)
        return torch.cat([self.model(*self.feed(block))[0] for block in rows.split(1024)]).cpu()
