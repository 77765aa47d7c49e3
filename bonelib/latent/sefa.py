"""Directions of a latent space from the weights alone: closed-form factorisation (Shen and Zhou 2021; eq. (11))."""

from typing import NamedTuple

import torch
from torch import Tensor

from bonelib import InputError


class Directions(NamedTuple):
    """Unit vectors (k, d), strongest first, and their eigenvalues (k,) in falling order."""

    vectors: Tensor
    values: Tensor


def directions(weight: Tensor, k: int, normalise: bool = False) -> Directions:
    """The `k` eigenvectors of A^T A with the largest eigenvalues (section 4.4, eq. (11)); `weight` is A, (outputs, d).

    `normalise` first brings every row of A to length one, as SeFa's own code does. The largest entry of a vector by
    amount is positive. Raises `InputError` for a weight that is no finite matrix, or has fewer than `k` columns.
    """
    if weight.dim() != 2 or not torch.isfinite(weight).all():
        raise InputError(f"weight has shape {tuple(weight.shape)}; accepted is a matrix (outputs, d) of finite numbers")
    if not 1 <= k <= weight.shape[1]:
        raise InputError(f"k is {k}; accepted is 1 to {weight.shape[1]}, the columns of the weight")
    weight = weight.detach().double()
    if normalise:
        weight = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(weight.T @ weight)
    values, vectors = values.flip(0)[:k], vectors.T.flip(0)[:k]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return Directions((vectors * largest.sign()).float(), values.float())
