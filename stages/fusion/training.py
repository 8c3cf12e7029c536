"""Training [paper 4.1]: all folds and seeds at once, as one batched model; on a CPU as several, side by side.

Models differ in their weights, their batches and their dropout, and each has its own optimiser state, so every
one comes out as if it had been trained alone (tests/test_fusion.py holds them equal). Features stay on the device:
a step gathers each model's rows, standardises them by the model's fold, drops, and runs M models in one pass.

Per model the epoch with the best validation WAF is kept; ties go to the earlier epoch. Nothing is copied to the
host, and so nothing waits for a GPU, before training ends.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, fields
from threading import Event

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from stages.engine.devices import cores, lanes
from stages.engine.params import Fusion
from stages.fusion.ensemble import Ensemble, Outputs
from stages.fusion.features import Inputs, Statistics, affine, fold_statistics
from stages.fusion.masks import DROPOUT, INITIAL, LOWEST, ORDER, RandomBits, keep_modalities, stream, threshold
from stages.fusion.model import Architecture, Parameters, first_layer, initial_parameters, logits


def train(inputs: Inputs, recipe: Fusion, labels: np.ndarray, name: str) -> Outputs:
    """Train len(recipe.seeds) x folds models on `inputs` with its modalities; the ensemble of each model at its best
    epoch then predicts the unlabelled and test clips, once.

    labels: (S, N) int64, the class that seed s learns for each clip, -1 for none: the labelled clips' classes,
    and pseudo-labels. name: what the progress bar shows.
    """
    shape = (len(recipe.seeds), inputs.fold_count)
    models = list(np.ndindex(*shape))
    statistics = fold_statistics(inputs, recipe.standardize)
    fitted = fit(inputs, recipe, labels, statistics, models, name)
    ensemble = Ensemble(
        architecture_of(inputs, recipe),
        inputs.label_names,
        tuple(recipe.seeds),
        fitted.parameters.unflatten(0, shape),
        {key: (mean.cpu(), scale.cpu()) for key, (mean, scale) in statistics.items()},
        recipe.dropout,
    )
    best, last = (torch.empty(shape[0], len(inputs.labels), fitted.best.shape[-1]) for _ in range(2))
    for m, (s, fold) in enumerate(models):
        rows = np.flatnonzero(inputs.folds == fold)
        best[s, rows], last[s, rows] = fitted.best[m, : len(rows)], fitted.last[m, : len(rows)]
    votes = ensemble.predict(inputs, inputs.others)
    rows = inputs.labelled
    return Outputs(ensemble, best[:, rows], last[:, rows], votes, fitted.curves.unflatten(0, shape))


def architecture_of(inputs: Inputs, recipe: Fusion) -> Architecture:
    """The model's shapes for these modalities and labels."""
    names, dimensions = tuple(m.name for m in inputs.modalities), tuple(m.dimension for m in inputs.modalities)
    return Architecture(names, dimensions, recipe.hidden, len(inputs.label_names))


@dataclass(frozen=True)
class Fitted:
    """M trained models, on the CPU. Validation softmaxes follow the rows of the model's fold, padded to the longest
    fold's."""

    parameters: Tensor  # (M, P) at the best epoch
    best: Tensor  # (M, V, L) validation softmaxes at the best epoch
    last: Tensor  # (M, V, L) at the last epoch
    curves: Tensor  # (M, epochs, 3): train_loss, valid_loss, valid_waf in percent


def fit(
    inputs: Inputs,
    recipe: Fusion,
    labels: np.ndarray,
    statistics: Statistics,
    models: Sequence[tuple[int, int]],
    name: str,
) -> Fitted:
    """Train the models (position of the seed, fold): on a GPU all at once, on a CPU in groups side by side, since
    models never meet.

    Where the cores can't share the models evenly, to a tenth, there are more groups than cores, and they take turns,
    epoch by epoch: five models keep two cores busy to the end.
    """
    count = min(cores(), len(models)) if inputs.device.type == "cpu" else 1
    largest = -(-len(models) // count)
    groups = count if count * largest <= 1.1 * len(models) else min(len(models), 2 * count - 1)
    trainings = [Training(inputs, recipe, labels, statistics, [models[i] for i in group])
                 for group in np.array_split(np.arange(len(models)), groups)]
    waiting, stop = deque(trainings), Event()

    def work() -> None:
        while waiting and not stop.is_set():
            try:
                training = waiting.popleft()
            except IndexError:  # another core was faster
                return
            training.run_epoch()
            if training is trainings[0]:
                bar.update()
            if training.epoch < recipe.epochs:
                waiting.append(training)

    with tqdm(total=recipe.epochs, desc=name, unit="epoch", mininterval=1, leave=False) as bar:
        if count == 1:
            work()
        else:
            with lanes(count) as pool:
                tasks = [pool.submit(work) for _ in range(count)]
                try:
                    for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                        task.result()
                finally:  # after an error, or Ctrl-C, the others need not go on
                    stop.set()
    done = [training.fitted() for training in trainings]
    return Fitted(*(torch.cat([getattr(part, field.name) for part in done]) for field in fields(Fitted)))


class Training:
    """Models (position of the seed, fold) that are trained as one batched model, epoch by epoch.

    A model learns from every clip with a label (S, N) that is not in its fold, and is validated on its fold. A
    pseudo-labelled clip is in no fold: it is learned from, never validated on.
    """

    def __init__(
        self,
        inputs: Inputs,
        recipe: Fusion,
        labels: np.ndarray,
        statistics: Statistics,
        models: Sequence[tuple[int, int]],
    ):
        device = inputs.device
        self.recipe, self.models, self.epoch = recipe, models, 0  # epoch: how many have been run
        self.architecture = architecture_of(inputs, recipe)
        seeds = [_word(stream(recipe.seeds[s], fold, 0, INITIAL)) for s, fold in models]
        self.flat = initial_parameters(self.architecture, seeds).to(device)
        self.gradient = torch.zeros_like(self.flat)
        self.parameters, self.gradients = map(self.architecture.views, (self.flat, self.gradient))
        # an optimiser entry per model: each steps or skips alone
        self.rows = [row.detach().requires_grad_() for row in self.flat]
        self.adam = torch.optim.Adam(self.rows, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
        self.feed = Feed(inputs, recipe, statistics, [fold for _, fold in models])

        self.classes = torch.from_numpy(labels[[s for s, _ in models]]).to(device)  # (M, N)
        self.training_rows = [np.flatnonzero((labels[s] >= 0) & (inputs.folds != fold)) for s, fold in models]
        self.sizes = torch.tensor([len(rows) for rows in self.training_rows], device=device)
        longest = int(np.bincount(inputs.folds[inputs.folds >= 0]).max())
        folds = [np.flatnonzero(inputs.folds == fold) for _, fold in models]
        self.valid, self.valid_weights = _padded(folds, longest, device)
        self.valid_classes = self.classes.gather(1, self.valid)
        self.best, self.best_waf = self.flat.clone(), torch.full((len(models),), -1.0, device=device)
        self.softmax = self.best_softmax = torch.zeros(*self.valid.shape, self.architecture.labels, device=device)
        self.curves = torch.zeros(len(models), recipe.epochs, 3, device=device)

    def run_epoch(self) -> None:
        """Train every model on its clips once, validate it, and keep it if it is the best so far."""
        curve = self.curves[:, self.epoch]
        plan, counts, widths = plan_epoch(self.training_rows, self.models, self.recipe, self.epoch)
        batches, weights, keys = (torch.from_numpy(array).to(self.flat.device) for array in plan)
        for step, width in enumerate(widths):
            chosen, weight = batches[step, :, :width], weights[step, :, :width]
            clips, dropout = self.feed.dropped(chosen, keys[step])
            actual = self.classes.gather(1, chosen)
            losses = backward(self.parameters, self.gradients, self.architecture, clips, dropout, actual, weight)
            curve[:, 0] += losses * weight.gt(0).sum(dim=1)
            for row, slope, count in zip(self.rows, self.gradient, counts, strict=True):
                row.grad = slope if step < count else None
            self.adam.step()
        curve[:, 0] /= self.sizes

        self.softmax = evaluate(self.parameters, self.architecture, self.feed, self.valid, self.recipe.batch_size)
        weights = self.valid_weights
        waf = batched_waf(self.valid_classes, self.softmax.argmax(dim=-1), weights, self.architecture.labels)
        entropy = -self.softmax.gather(-1, self.valid_classes[..., None])[..., 0].clamp(min=1e-30).log()
        curve[:, 1] = (entropy * weights).sum(dim=1) / weights.sum(dim=1)
        curve[:, 2] = waf
        better = waf > self.best_waf
        self.best_waf = torch.maximum(waf, self.best_waf)
        torch.where(better[:, None], self.flat, self.best, out=self.best)
        self.best_softmax = torch.where(better[:, None, None], self.softmax, self.best_softmax)
        self.epoch += 1

    def fitted(self) -> Fitted:
        return Fitted(self.best.cpu(), self.best_softmax.cpu(), self.softmax.cpu(), self.curves.cpu())


def plan_epoch(
    training_rows: Sequence[np.ndarray], models: Sequence[tuple[int, int]], recipe: Fusion, epoch: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[int], list[int]]:
    """The epoch's batches: rows (steps, M, B) int64, weights (steps, M, B) float32, keys (steps, M) int64 of the
    dropout; then each model's number of steps; then each step's width, the clips of its largest batch.

    Every model shuffles its own rows. The last batch is what is left, filled up with weight 0; a weight is one over
    the number of clips in the batch. Models with fewer batches than others have weights of 0 beyond them.
    """
    counts = [-(-len(rows) // recipe.batch_size) for rows in training_rows]
    shape = (max(counts), len(models), recipe.batch_size)
    rows, weights, keys = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape[:2], np.int64)
    for m, (s, fold) in enumerate(models):
        order = np.random.default_rng(stream(recipe.seeds[s], fold, epoch, ORDER)).permutation(training_rows[m])
        step, place = np.divmod(np.arange(len(order)), recipe.batch_size)
        rows[:, m] = order[0]  # what the filling repeats must have a class
        rows[step, m, place] = order
        weights[step, m, place] = 1 / np.bincount(step)[step]
        words = stream(recipe.seeds[s], fold, epoch, DROPOUT).generate_state(counts[m], np.uint64)
        keys[: counts[m], m] = words.view(np.int64)
    return (rows, weights, keys), counts, (weights > 0).sum(axis=2).max(axis=1).tolist()


def backward(
    parameters: Parameters,
    gradients: Parameters,
    architecture: Architecture,
    clips: Sequence[Tensor],
    dropout: Tensor | None,
    classes: Tensor,
    weights: Tensor,
) -> Tensor:
    """Write the gradient of every model's loss into `gradients`; return the losses (M,).

    clips: per modality (M, B, D); classes, weights: (M, B); a loss is the weighted sum of its cross-entropies. The
    first layers' weight gradients, nearly all of the memory traffic, go straight to their place.
    """
    names = architecture.modalities
    first = [first_layer(parameters, name, x).requires_grad_() for name, x in zip(names, clips, strict=True)]
    wide = {f"encoders.{name}.linear_1.{kind}" for name in names for kind in ("weight", "bias")}
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items() if name not in wide}
    scores = logits(leaves, names, first, dropout)
    entropy = cross_entropy(scores.flatten(0, 1), classes.flatten(), reduction="none").view_as(weights)
    losses = (entropy * weights).sum(dim=1)
    slopes = torch.autograd.grad(losses.sum(), [*first, *leaves.values()])
    for name, x, slope in zip(names, clips, slopes, strict=False):
        torch.bmm(slope.mT, x, out=gradients[f"encoders.{name}.linear_1.weight"])
        torch.sum(slope, dim=1, out=gradients[f"encoders.{name}.linear_1.bias"])
    for name, slope in zip(leaves, slopes[len(names) :], strict=True):
        gradients[name].copy_(slope)
    return losses.detach()


class Feed:
    """Makes the models' inputs from row numbers: gather, standardise, drop.

    Everything is written to buffers that are made once: at this size allocating costs as much as computing.
    """

    def __init__(self, inputs: Inputs, recipe: Fusion, statistics: Statistics, folds: Sequence[int]):
        device, batch, models = str(inputs.device), recipe.batch_size, len(folds)
        self.recipe, self.modalities, self.present = recipe, inputs.modalities, inputs.present
        self.complete = bool(inputs.present.all())
        fold_of = torch.tensor(folds, device=device)
        self.affine, self.offsets, self.gathered, self.buffers = [], [], [], []
        for modality in self.modalities:
            factor, shift = affine(modality, *statistics[modality.name])
            self.affine.append((factor[fold_of][:, None], shift[fold_of][:, None]))
            groups, clips, dimension = modality.matrix.shape
            self.offsets.append((fold_of % groups * clips)[:, None])  # the fold's own matrix, where it has one
            self.buffers.append(torch.empty(models, batch, dimension, device=device))
            gathered = torch.empty(models * batch, dimension, dtype=modality.matrix.dtype, device=device)
            self.gathered.append(gathered if gathered.dtype == torch.float16 else self.buffers[-1].flatten(0, 1))
        self.sizes = [batch * len(self.modalities), *(batch * m.dimension for m in self.modalities)]
        self.sizes.append(batch * len(self.modalities) * recipe.hidden)
        self.bits = RandomBits(models, sum(self.sizes), device)
        widest = models * batch * max(m.dimension for m in self.modalities)
        self.below = torch.empty(widest, dtype=torch.int16, device=device)  # not bool: ten times slower on a CPU
        self.mask = torch.empty(widest, device=device)

    def clean(self, rows: Tensor) -> list[Tensor]:
        """Inputs in evaluation: (M, B) rows, B at most the batch size -> per modality (M, B, D), valid until the
        next call. Absent modalities are zeros; nothing is dropped."""
        clips = [self._standardised(i, rows, 1.0) for i in range(len(self.modalities))]
        if not self.complete:
            for i, x in enumerate(clips):
                x.mul_(self.present[rows, i, None])
        return clips

    def dropped(self, rows: Tensor, keys: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Inputs in training: (M, B) rows, B at most the batch size, and (M,) keys -> per modality (M, B, D), valid
        until the next call, and the dropout of the attention encoder's input.

        First whole modalities go [paper eq. 2], then single numbers (dropout). A dropped modality is zeros, like
        an absent one, and is not made up for by scaling.
        """
        recipe, clips_per_model = self.recipe, rows.shape[1]
        drawn = self.bits.draw(keys).split(self.sizes, dim=1)
        bits = [piece.unflatten(1, (recipe.batch_size, -1))[:, :clips_per_model] for piece in drawn]
        present = self.present[rows]
        keep = present & keep_modalities(bits[0], present, recipe.modality_dropout, recipe.keep_one)
        if recipe.dropout == 0:
            clips = self.clean(rows)
            for i, x in enumerate(clips):
                x.mul_(keep[..., i, None])
            return clips, None
        scale, limit = 1 / (1 - recipe.dropout), threshold(1 - recipe.dropout)
        limits = torch.where(keep, limit, LOWEST).to(torch.int16)  # no number is below LOWEST: the modality is gone
        clips = []
        for i in range(len(self.modalities)):
            x = self._standardised(i, rows, scale)
            below = torch.lt(bits[i + 1], limits[..., i, None], out=self.below[: x.numel()].view_as(x))
            clips.append(x.mul_(self.mask[: x.numel()].view_as(x).copy_(below)))
        attention = (bits[-1] < limit) * scale
        return clips, attention

    def _standardised(self, i: int, rows: Tensor, scale: float) -> Tensor:
        matrix, count = self.modalities[i].matrix.flatten(0, 1), rows.numel()
        gathered = self.gathered[i][:count]
        torch.index_select(matrix, 0, (rows + self.offsets[i]).flatten(), out=gathered)
        x = self.buffers[i].flatten(0, 1)[:count]
        if x.data_ptr() != gathered.data_ptr():
            x.copy_(gathered)
        x = x.view(*rows.shape, -1)
        factor, shift = self.affine[i]
        return torch.addcmul(shift * scale, x, factor * scale, out=x)


@torch.inference_mode()
def evaluate(parameters: Parameters, architecture: Architecture, feed: Feed, rows: Tensor, batch: int) -> Tensor:
    """Softmax of each model for its rows (M, V), without dropout: (M, V, L)."""
    softmaxes = []
    for block in rows.split(batch, dim=1):
        clips = zip(architecture.modalities, feed.clean(block), strict=True)
        first = [first_layer(parameters, name, x) for name, x in clips]
        softmaxes.append(logits(parameters, architecture.modalities, first).softmax(dim=-1))
    return torch.cat(softmaxes, dim=1)


def batched_waf(actual: Tensor, predicted: Tensor, weights: Tensor, classes: int) -> Tensor:
    """WAF in percent, sklearn's weighted F1, of M models at once, on their device.

    actual, predicted: (M, V) classes; weights: (M, V), 1 for a clip and 0 for padding. Returns (M,) float32.
    """
    models = torch.arange(len(actual), device=actual.device)[:, None]
    cells = (models * classes + actual) * classes + predicted
    counts = torch.zeros(len(actual) * classes * classes, device=actual.device)
    counts.scatter_add_(0, cells.flatten(), weights.flatten())  # whole numbers below 2^24: exact in any order
    counts = counts.view(-1, classes, classes)
    support, called = counts.sum(dim=2), counts.sum(dim=1)
    f1 = 2 * counts.diagonal(dim1=1, dim2=2) / (support + called).clamp(min=1)
    return 100 * (f1 * support).sum(dim=1) / support.sum(dim=1).clamp(min=1)


def _padded(rows: Sequence[np.ndarray], longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different number as (M, longest) int64, filled up with each model's first, and weights 1 or 0."""
    padded = np.stack([np.pad(r, (0, longest - len(r)), constant_values=r[0]) for r in rows])
    weights = np.stack([np.arange(padded.shape[1]) < len(r) for r in rows]).astype(np.float32)
    return torch.from_numpy(padded).to(device), torch.from_numpy(weights).to(device)


def _word(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
