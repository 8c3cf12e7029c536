"""Pre-training of the fusion's encoders on all clips, labelled or not, without labels: contrastive between modalities.

The encodings of one clip's modalities, each through a small projection head, are to be more alike than those of
different clips: InfoNCE (van den Oord et al. 2018) in both directions with the batch's other clips as negatives, as in
CLIP (Radford et al. 2021, section 2.3) but at a fixed temperature; the mean over all pairs of modalities, of the clips
that have both. Of a single modality two views by dropout on its input are compared (as SimCSE, Gao et al. 2021). The
heads are thrown away (Chen et al. 2020, section 4.2).

Every fold and seed has encoders of its own, and fold f's never see a clip of its validation part, nor the statistics
of one: features are standardised by the fold's training part. Test clips are seen only where self-training may use
them too. Models never meet, as in training.py: the same bits alone and among others.
"""

from collections.abc import Sequence
from itertools import combinations
from threading import Lock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from stages.engine.errors import PipelineError
from stages.engine.params import Fusion, Pretraining
from stages.fusion.features import Inputs, Standardised, fold_statistics, group_statistics
from stages.fusion.pretrained import Pretrained, encoders_of
from stages.fusion.training import architecture_of, in_turns

PROJECTION = 64  # width of what is compared [choice]
KEY = 1  # of the random numbers that are drawn here: others than training's for the same seed and fold


def pretrain(inputs: Inputs, fusion: Fusion, p: Pretraining, include_test: bool) -> tuple[Pretrained, Tensor]:
    """Encoders for every seed and fold, and the loss by epoch, (S, F, epochs) float32.

    Raises PipelineError for an architecture without encoders, for a single modality without dropout, and where a fold
    has too few clips.
    """
    if len(inputs.modalities) == 1 and fusion.dropout == 0:
        raise PipelineError("params.yaml: fusion.dropout: found 0, expected more: with one modality, "
                            "pretraining.method contrastive compares two views that only dropout tells apart")
    shape = (len(fusion.seeds), inputs.fold_count)
    statistics, groups = fold_statistics(inputs, fusion), group_statistics(inputs, fusion.by_group)
    feeds = [Standardised(inputs, statistics, fold, groups) for fold in range(inputs.fold_count)]
    models = [Contrast(inputs, fusion, p, feeds[fold], fusion.seeds[s], fold, include_test)
              for s, fold in np.ndindex(*shape)]
    in_turns(models, p.epochs, inputs.device, "pretrain_fusion")
    states = [model.state() for model in models]
    weights = {name: torch.stack([state[name] for state in states]).unflatten(0, shape).cpu() for name in states[0]}
    losses = torch.tensor([model.losses for model in models]).unflatten(0, shape)
    return Pretrained(tuple(fusion.seeds), weights), losses


def clips_seen(inputs: Inputs, fold: int, include_test: bool) -> np.ndarray:
    """Rows of the clips that fold's encoders learn from: with a modality, or with two where there are several."""
    seen = (inputs.folds != fold) & (include_test | (inputs.splits != "test"))
    enough = inputs.present.sum(dim=1).cpu().numpy() >= min(2, len(inputs.modalities))
    return np.flatnonzero(seen & enough)


class Contrast:
    """The encoders of one seed and fold with their projection heads, trained epoch by epoch."""

    def __init__(
        self, inputs: Inputs, fusion: Fusion, p: Pretraining, feed: Standardised, seed: int, fold: int,
        include_test: bool,
    ):
        device = inputs.device
        words = np.random.SeedSequence(seed, spawn_key=(fold, KEY)).generate_state(3)
        initial, order, dropout = (int(word) for word in words)
        self.order = torch.Generator().manual_seed(order)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(initial)
            model = architecture_of(inputs, fusion).build(torch.Generator(device).manual_seed(dropout))
            self.encoders = encoders_of(model).to(device).train()
            self.heads = nn.ModuleList(head(fusion.hidden) for _ in self.encoders).to(device)
        self.names = [modality.name for modality in inputs.modalities]
        weights = [*self.encoders.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.Adam(weights, p.learning_rate, fused=True)
        self.rows = torch.from_numpy(clips_seen(inputs, fold, include_test))
        if len(self.rows) < 2:
            raise PipelineError(f"pretrain_fusion: found {len(self.rows)} clips for fold {fold}, expected two or more")
        self.feed, self.batch, self.temperature, self.lock = feed, p.batch_size, p.temperature, Lock()
        self.losses: list[float] = []

    def run_epoch(self) -> None:
        """One pass over the clips in a new order."""
        with self.lock:
            total = torch.zeros((), device=self.feed.device)
            shuffled = self.rows[torch.randperm(len(self.rows), generator=self.order)].to(total.device)
            batches = shuffled.tensor_split(-(-len(shuffled) // self.batch))  # of like size: negatives for each clip
            for rows in batches:
                loss = self._loss(*self.feed(rows))
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                total += loss.detach()
            self.losses.append(float(total) / len(batches))

    def _loss(self, features: Sequence[Tensor], present: Tensor) -> Tensor:
        """The batch's mean InfoNCE over the pairs of modalities."""
        views = [(i, self._project(i, x)) for i, x in enumerate(features)]
        if len(features) == 1:
            views.append((0, self._project(0, features[0])))
        losses = []
        for (i, one), (j, other) in combinations(views, 2):
            both = present[:, i] & present[:, j]
            losses.append(info_nce(one[both], other[both], self.temperature))
        return torch.stack(losses).mean()

    def _project(self, modality: int, x: Tensor) -> Tensor:
        return normalize(self.heads[modality](self.encoders[modality](x)), dim=1)

    def state(self) -> dict[str, Tensor]:
        """The encoders' weights by modality, as Pretrained names them."""
        return {f"{name}.{key}": values.detach() for name, encoder in zip(self.names, self.encoders, strict=True)
                for key, values in encoder.state_dict().items()}


def head(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, PROJECTION))


def info_nce(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of finding each row's counterpart among all rows, in both directions; 0 without rows.

    one, other: (n, width), of length 1.
    """
    if not len(one):
        return (one.sum() + other.sum()) * 0
    similarity, own = one @ other.T / temperature, torch.arange(len(one), device=one.device)
    return (cross_entropy(similarity, own) + cross_entropy(similarity.T, own)) / 2
