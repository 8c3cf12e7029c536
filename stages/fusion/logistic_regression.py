"""Multinomial logistic regression with an L2 penalty, several at once, also for more dimensions than clips.

It minimises what scikit-learn's LogisticRegression does: the loss summed over the clips + |weights|^2 / 2C, the
intercept free (two classes are a softmax here too, in which scikit-learn's C means twice as much). Choosing C takes
hundreds of fits, of which scikit-learn's took 20 to 60 s each at 3,200 clips and 4,000 coordinates. Here all that one
fold of MER2024's size needs (5 inner folds, one seed, 14,592 dimensions) takes 100 s of CPU time:

- the weights lie in the span of the training clips, so as many coordinates as there are clips are enough;
- along the eigenvectors of the clips' Gram matrix the Hessian is nearly diagonal: scaled by it, L-BFGS takes 10 to 50
  steps where scikit-learn took 40 to 120;
- problems that differ in their clips alone (inner folds) share every product with the clips' matrix.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

SMALLEST = 1e-7  # eigenvalues below this share of the greatest are float32's rounding
NEVER = -1e9  # the logit of a class that no clip of the problem has: its probability is 0


@dataclass(frozen=True)
class Coordinates:
    """Clips (n, D) in r orthogonal coordinates, r at most the lesser of n and D; what lies between clips is kept."""

    clips: Tensor  # (n, r) float32
    sizes: Tensor  # (r,) sums of squares of its columns
    mean: Tensor  # (D,) of the clips, subtracted first: it changes nothing but the intercepts
    basis: Tensor  # (D, r); where D > n (n, r): what combines the centred clips to it
    centred: Tensor | None  # (n, D) where D > n

    def weights(self, w: Tensor) -> Tensor:
        """Weights (r, k) of these coordinates as weights (D, k) of the features."""
        return self.basis @ w if self.centred is None else self.centred.T @ (self.basis @ w)


def coordinates(features: Tensor) -> Coordinates:
    """features: (n, D) float32."""
    mean = features.mean(dim=0)
    x = features - mean
    wide = x.shape[1] > x.shape[0]
    sizes, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = sizes > SMALLEST * sizes[-1]
    sizes, vectors = sizes[kept], vectors[:, kept]
    if wide:
        return Coordinates(vectors * sizes.sqrt(), sizes, mean, vectors / sizes.sqrt(), x)
    return Coordinates(x @ vectors, sizes, mean, vectors, None)


@dataclass(frozen=True)
class Solution:
    """The minima of P problems."""

    weights: Tensor  # (P, r, L) of the coordinates
    intercepts: Tensor  # (P, L)

    def logits(self, clips: Tensor) -> Tensor:
        """(P, n, L) of clips (n, r)."""
        return _product(clips, self.weights) + self.intercepts[:, None]


def fit(
    x: Coordinates, labels: Tensor, used: Tensor, classes: int, c: float, gradient: float, start: Solution | None = None
) -> Solution:
    """P problems at one C, side by side.

    labels: (n,) int64. used: (P, n) bool, the clips that each learns from. gradient: its greatest entry at the end, in
    coordinates in which the Hessian is at most about 1. start: the minima at a C nearby.
    """
    shape = (len(used), len(x.sizes) + 1, classes)
    seen = torch.stack([torch.bincount(labels[own], minlength=classes) > 0 for own in used])
    never = torch.where(seen, 0.0, NEVER)
    target = torch.nn.functional.one_hot(labels, classes).float()
    counted = used[..., None].float()
    curvature = (1 - 1 / classes) / classes  # of the loss in a logit, where all classes are as likely
    scale = torch.rsqrt(curvature * x.sizes + 1 / c)[:, None]  # weights = scale * what L-BFGS sees
    free = torch.rsqrt(curvature * used.sum(dim=1, keepdim=True))  # the same of the intercepts

    def unpack(flat: np.ndarray) -> Solution:
        v = torch.from_numpy(flat).to(x.sizes).view(shape)
        return Solution(v[:, :-1] * scale, v[:, -1] * free + never)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        now = unpack(flat)
        logs = now.logits(x.clips).log_softmax(dim=-1)
        residual = counted * (logs.exp() - target)
        loss = -torch.where(counted * target > 0, logs, 0.0).sum(dtype=torch.float64)
        penalty = now.weights.square().sum(dtype=torch.float64) / (2 * c)
        slope = torch.empty(shape, device=labels.device)
        slope[:, :-1] = (_product(x.clips.T, residual) + now.weights / c) * scale
        slope[:, -1] = residual.sum(dim=1) * free
        return float(loss + penalty), (slope * seen[:, None]).double().cpu().numpy().ravel()

    first = torch.zeros(shape, device=labels.device)
    if start is not None:
        first[:, :-1], first[:, -1] = start.weights / scale, (start.intercepts - never) / free
    found = minimize(objective, first.double().cpu().numpy().ravel(), jac=True, method="L-BFGS-B",
                     options={"maxiter": 1000, "gtol": gradient, "ftol": 1e-12})
    return unpack(found.x)


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """(a, b) x (P, b, k) -> (P, a, k), as one product."""
    count, rows, width = columns.shape
    product = matrix @ columns.permute(1, 0, 2).reshape(rows, count * width)
    return product.view(-1, count, width).permute(1, 0, 2)
