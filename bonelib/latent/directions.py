"""Directions of a latent space from labelled codes, straight and bent, and how bent a decision surface is.

Ridge and logistic regression give a straight direction; the forward and reverse networks of Fetty et al. 2020 walk
along a bent one where these earn it. Codes are (n, d): one style of a bone.
"""

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from bonelib import InputError
from bonelib.core.random import numpy_rng, torch_rng

PENALTIES = tuple(10.0**p for p in range(-4, 3))  # of the ridge, in shares of the codes' mean variance
FOLDS = 5
STEPS_OF_LOGISTIC = 200
LEAST = 20  # codes with labels from which directions are learned
HALVINGS = 40  # of the distance of two codes, between which a surface is found
ENDS = (0.4, 0.6)  # classes are codes below the first and above the second quantile


class Direction(NamedTuple):
    """value = offset + slope * (code @ vector), with a unit vector (d,); of a class, the value is its log-odds."""

    vector: Tensor
    slope: float
    offset: float

    def value(self, codes: Tensor) -> Tensor:
        return self.offset + self.slope * (codes @ self.vector)


def ridge(codes: Tensor, values: Tensor, groups=None) -> tuple[Direction, float]:
    """The direction along which `values` (n,) rise by ridge regression, and R2 on groups that were left out.

    The penalty is the best of `PENALTIES` in `FOLDS` folds of `groups`, n names of patients (or each code its own).
    """
    x, y = codes.double(), values.double()
    fold = _folds(len(x), groups)
    scores = []
    for penalty in PENALTIES:
        predicted = torch.empty_like(y)
        for k in range(FOLDS):
            weights, offset = _ridge(x[fold != k], y[fold != k], penalty)
            predicted[fold == k] = x[fold == k] @ weights + offset
        scores.append(r2(predicted, y))
    weights, offset = _ridge(x, y, PENALTIES[int(np.argmax(scores))])
    slope = float(weights.norm())
    return Direction((weights / slope).float(), slope, float(offset)), max(scores)


def ridge_left_out(codes: Tensor, values: Tensor, groups=None) -> Tensor:
    """What `ridge` says of each of `values` (n,), fitted to other groups, its penalty chosen among these as well."""
    names = np.arange(len(codes)) if groups is None else np.asarray(groups)
    fold, found = _folds(len(codes), groups), torch.empty(len(codes), dtype=values.dtype)
    for k in range(FOLDS):
        inside = fold != k
        found[~inside] = ridge(codes[inside], values[inside], names[inside.numpy()])[0].value(codes[~inside]).to(found)
    return found


def ridges(codes: Tensor, values: Tensor, names) -> tuple[dict[str, Direction], list[dict]]:
    """The ridge direction of every attribute, {name: direction} of values (n, names), and rows with their R2.

    From fewer than `LEAST` codes there are no directions, and R2 is NaN.
    """
    found, rows = {}, []
    for name, column in zip(names, values.unbind(1), strict=True):
        score = float("nan")
        if len(codes) >= LEAST:
            found[name], score = ridge(codes, column)
        rows.append({"attribute": name, "N": len(codes), "R2, left out": score})
    return found, rows


def _ridge(x, y, penalty):
    found = Ridge(float(penalty * len(x) * x.var(0, correction=0).mean()), solver="cholesky").fit(x.numpy(), y.numpy())
    return torch.from_numpy(found.coef_), float(found.intercept_)


def logistic(codes: Tensor, labels: Tensor, penalty: float = 1e-2) -> Direction:
    """The normal of the plane that parts codes by their labels (n,), False or True: logistic regression.

    `penalty` times half the squared weights is added to the mean loss. Raises `InputError` if a class is empty.
    """
    x, y = codes.double(), labels.double()
    if not 0 < float(y.mean()) < 1:
        raise InputError("labels are all the same; a direction needs codes of both classes")
    weights = torch.zeros(x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=STEPS_OF_LOGISTIC, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        odds = x @ weights[1:] + weights[0]
        total = F.binary_cross_entropy_with_logits(odds, y) + penalty / 2 * weights[1:].square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    weights = weights.detach()
    slope = float(weights[1:].norm())
    return Direction((weights[1:] / slope).float(), slope, float(weights[0]))


def accuracy(odds: Tensor, labels: Tensor) -> float:
    """Share of codes whose log-odds (n,) have the sign of their labels."""
    return float(((odds > 0) == labels.bool()).float().mean())


class _Trained(NamedTuple):
    """A network and the score it was chosen by on left-out codes: accuracy of a classifier, R2 of a reverse model."""

    network: nn.Module
    score: float
    widths: tuple[int, ...]
    rate: float


def _perceptron(sizes: tuple[int, ...], dropout: float = 0.0) -> nn.Sequential:
    """Dense layers of these sizes, with a smooth rectifier between them: behind leaky ones, as in Fetty et al.'s
    encoder, decision surfaces are made of planes, whose curvature is 0 whatever was learned."""
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b)]
        if i < len(sizes) - 2:
            layers += [nn.SiLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def search(
    inputs: Tensor, outputs: Tensor, left_out: Tensor, *, seed: int, tries: int, epochs: int, least: int = 1
) -> _Trained:
    """The best of `tries` perceptrons with random widths, dropout and rate, by its score where `left_out` (n,) is True
    (Fetty et al., "Latent space models, and model selection"). `outputs` are labels (n,), for a classifier, or vectors
    (n, d). At least `least` hidden layers, up to two more."""
    best = None
    for i in range(tries):
        rng = numpy_rng(seed, "network", i)
        widths = tuple(int(w) for w in rng.integers(32, 257, size=least + rng.integers(0, 3)))
        dropout, rate = float(rng.choice([0.0, 0.1])), float(10 ** rng.uniform(-3.5, -2))
        found = _trained(inputs, outputs, left_out, widths, dropout, rate, epochs, seed, i)
        if best is None or found.score > best.score:
            best = found
    return best


def _trained(inputs, outputs, left_out, widths, dropout, rate, epochs, seed, number):
    classes = outputs.dim() == 1
    with torch.random.fork_rng():
        torch.manual_seed(torch_rng(seed, "weights", number).initial_seed())
        network = _perceptron((inputs.shape[1], *widths, 1 if classes else outputs.shape[1]), dropout)
        x, y = inputs[~left_out], outputs[~left_out].float()
        optimiser = torch.optim.Adam(network.parameters(), lr=rate)
        batch = min(64, len(x))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * (len(x) // batch))
        for _ in range(epochs):
            for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
                found = network(x[rows])
                logits, wanted = (found[:, 0] if classes else found), y[rows]
                loss = F.binary_cross_entropy_with_logits(logits, wanted) if classes else F.mse_loss(logits, wanted)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    network.requires_grad_(False).eval()
    found, truth = network(inputs[left_out]), outputs[left_out].float()
    score = accuracy(found[:, 0], truth) if classes else r2(found, truth)
    return _Trained(network, score, widths, rate)


def r2(predicted: Tensor, truth: Tensor) -> float:
    """Share of the variance of numbers (n,) or vectors (n, d) that is predicted, over all entries."""
    return float(1 - (predicted - truth).square().sum() / (truth - truth.mean(0)).square().sum())


def chosen(reverse_r2: float, deep_accuracy: float, logistic_accuracy: float) -> str:
    """What to walk with, "networks" or "logistic", after Fetty et al.: networks must be better, with their way back."""
    return "networks" if reverse_r2 * deep_accuracy > logistic_accuracy else "logistic"


def hidden(network: nn.Sequential, codes: Tensor) -> Tensor:
    """The last hidden layer of a classifier: Forward of formula (3)."""
    return network[:-1](codes)


class Way(NamedTuple):
    """Along what codes are moved: to a space where an attribute has a unit `normal` (h,), and back."""

    forward: Callable[[Tensor], Tensor]
    reverse: Callable[[Tensor], Tensor]
    normal: Tensor


def straight(direction: Direction) -> Way:
    """The space of the codes themselves."""
    return Way(lambda codes: codes, lambda codes: codes, direction.vector)


def bent(network: nn.Sequential, back: nn.Module) -> Way:
    """The last hidden layer of a classifier, and the network that leads back."""
    weight = network[-1].weight[0]
    return Way(lambda codes: hidden(network, codes), back, weight / weight.norm())


def formula3(way: Way, codes: Tensor, mean: Tensor, tau: float, alpha: float) -> Tensor:
    """Codes (n, d) moved by formula (3) of Fetty et al.: drawn to the `mean` code (d,) by the truncation `tau`, then
    moved by `alpha` along the normal."""
    inner, centre = way.forward(codes), way.forward(mean[None])
    return way.reverse(centre + tau * (inner - centre) + alpha * way.normal)


def told_apart(x: Tensor, labels: Tensor, left: Tensor, codes: Tensor, apart: Tensor, **budget) -> tuple:
    """What tells labels (n,) of codes x (n, d) apart: a plane, the best network of `search`, and its way back to
    `codes` (m, d); and how well on those that are left out, `left` (n,) and `apart` (m,), with what the rule takes."""
    plane, deep = logistic(x[~left], labels[~left]), search(x, labels, left, **budget)
    back = search(hidden(deep.network, codes), codes, apart, **budget)
    plain = accuracy(plane.value(x[left]), labels[left])
    scores = {"logistic": plain, "network": deep.score, "R2 of the way back": back.score}
    return plane, deep, back, scores | {"taken": chosen(back.score, deep.score, plain)}


def compare_linear_nonlinear(
    codes: Tensor, values: Tensor, *, seed: int, tries: int, epochs: int, points: int, tangents: int
) -> dict:
    """Logistic regression and networks on codes (n, d) with the lowest and highest 40 % of `values` (n,), as one row:
    accuracies and R2 of the way back on every fourth code, which was left out, what the rule takes, and mean, SD and
    median largest principal curvature of the network's decision surface. Fewer than `LEAST` codes are not parted."""
    if len(codes) < LEAST:
        return {"N": len(codes)}
    low, high = values.quantile(torch.tensor(ENDS))
    ends = (values < low) | (values > high)
    x, y = codes[ends], values[ends] > high
    left, apart = (torch.arange(len(v)) % 4 == 0 for v in (x, codes))
    _, deep, _, scores = told_apart(x, y, left, codes, apart, seed=seed, tries=tries, epochs=epochs)
    row = {"N": len(x), "N left out": int(left.sum())} | scores
    try:
        bent = bending(deep.network, x, points, seed=seed, tangents=tangents)
    except InputError:  # the network says the same of all codes
        return row | {"points": 0}
    row |= {"points": points, "mean curvature": float(bent.mean.mean()), "SD": float(bent.mean.std())}
    return row | {"largest principal, median": float(bent.largest.abs().median())}


def bending(network: nn.Module, codes: Tensor, points: int, *, seed: int, tangents: int) -> "Curvature":
    """The `curvature` of a classifier's decision surface at points between codes; raises as `surface_points`."""
    exact = copy.deepcopy(network).double()

    def odds(z):
        return exact(z.double())[:, 0]

    return curvature(odds, surface_points(odds, codes, points, seed=seed), seed=seed, tangents=tangents)


def parted(side: Tensor) -> bool:
    """Whether codes lie on both sides of a decision surface, by the `side` (n,) of each."""
    return bool(side.any() and not side.all())


def surface_points(function: Callable[[Tensor], Tensor], codes: Tensor, n: int, *, seed: int) -> Tensor:
    """`n` points (n, d) where `function` (n, d) -> (n,) is 0, on lines between random codes on either side.

    Raises `InputError` if all codes lie on one side.
    """
    side = function(codes) > 0
    if not parted(side):
        raise InputError("all codes lie on one side of the decision surface; it cannot be found between them")
    rng = numpy_rng(seed, "surface points")
    inner, outer = (torch.from_numpy(rng.choice(np.flatnonzero(mask.numpy()), n)) for mask in (~side, side))
    low, high = codes[inner], codes[outer]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = (function(middle) > 0)[:, None]
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


class Curvature(NamedTuple):
    """Of every point (n,): the mean normal curvature over tangents, and the largest principal one by amount."""

    mean: Tensor
    largest: Tensor


def curvature(
    function: Callable[[Tensor], Tensor], points: Tensor, *, seed: int, tangents: int | None = None
) -> Curvature:
    """Curvature of the surface function = 0 at points on it, (n, d), in 1 / unit of the codes.

    The normal curvature along a unit tangent t is t' H t / |g|, with gradient g and Hessian H: positive where the
    surface bends away from the side of larger values. `mean` averages it over random tangents, as Fetty et al. do with
    512, or over all of them, from the trace of H, if `tangents` is None.
    """

    def at(point):
        return function(point[None])[0]

    means, largest = [], []
    for i, point in enumerate(points.double()):
        gradient, d = torch.func.grad(at)(point), len(point)
        normal = gradient / gradient.norm()
        inner = torch.eye(d, dtype=point.dtype) - torch.outer(normal, normal)
        shape = inner @ torch.func.hessian(at)(point) @ inner / gradient.norm()
        values = torch.linalg.eigvalsh(shape)
        largest.append(values[values.abs().argmax()])
        if tangents is None:
            means.append(values.sum() / (d - 1))
        else:
            some = torch.randn(tangents, d, generator=torch_rng(seed, "tangents", i), dtype=point.dtype) @ inner
            some = some / some.norm(dim=1, keepdim=True)
            means.append(((some @ shape) * some).sum(1).mean())
    return Curvature(torch.stack(means).float(), torch.stack(largest).float())


def _folds(n, groups):
    names, group = np.unique(np.arange(n) if groups is None else np.asarray(groups), return_inverse=True)
    if len(names) < FOLDS:
        raise InputError(f"{len(names)} patients are too few for {FOLDS} folds")
    return torch.from_numpy(numpy_rng(0, "folds").permutation(len(names))[group] % FOLDS)
