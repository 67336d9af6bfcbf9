"""Feature maps whose inner product is a polynomial of q·k: what lets a fixed state stand in for softmax weights.

Source: arXiv:2402.18668, section 4.1 (the order-2 Taylor map of exp); the packing, each monomial once, is ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from memlens import check

__all__ = ["feature_count", "poly_features", "taylor_features", "unpacked_taylor_features"]


@lru_cache(maxsize=64)
def _monomials(dim: int, degree: int) -> tuple[Tensor, Tensor]:
    """Index tuples i1 <= .. <= degree, (n, degree), and the square root of how often each occurs in (x·y)**degree, (n,)."""
    picks = list(combinations_with_replacement(range(dim), degree))
    times = [math.factorial(degree) / math.prod(map(math.factorial, Counter(pick).values())) for pick in picks]
    return torch.tensor(picks, dtype=torch.long).reshape(len(picks), degree), torch.tensor(
        times, dtype=torch.float64
    ).sqrt()


def feature_count(dim: int, order: int = 2) -> int:
    """How many features `poly_features` gives: the sum of C(dim + i - 1, i) for i = 0 .. order.

    >>> feature_count(16), feature_count(16, order=1)
    (153, 17)
    """
    check.at_least("feature_count", 1, "a feature map needs at least one input feature", dim=dim)
    check.at_least("feature_count", 0, order=order)
    return sum(math.comb(dim + i - 1, i) for i in range(order + 1))


def poly_features(x: Tensor, coef: Sequence[float]) -> Tensor:
    """Packed monomials f with f(x)·f(y) = sum_i coef[i] (x·y)**i.

    A monomial that (x·y)**i holds m times is kept once, times sqrt(coef[i] m), so the map is as short as it can be.

    Args:
        x: (..., dim).
        coef: one non-negative number for each degree 0 .. order.
    Returns:
        (..., feature_count(dim, order)), dtype of x: degree 0 first, and inside a degree in lexical order.
    Raises:
        ValueError: dim 0, no coefficient, or one that is negative or not finite (its root would not be real).
    """
    if not len(coef) or not all(0 <= c < math.inf for c in coef):
        check.fail("poly_features", f"coef={list(coef)}", "one finite number >= 0 for each degree")
    dim = x.shape[-1]
    check.at_least("poly_features", 1, "x needs at least one feature", dim=dim)
    parts = []
    for degree, weight in enumerate(coef):
        index, root = _monomials(dim, degree)
        product = torch.ones((), dtype=x.dtype, device=x.device).expand(*x.shape[:-1], len(root))
        for column in index.to(x.device).unbind(-1):
            product = product * x[..., column]
        parts.append(product * (root * math.sqrt(weight)).to(x))
    return torch.cat(parts, dim=-1)


def taylor_features(x: Tensor, *, order: int = 2) -> Tensor:
    """Features f with f(q)·f(k) = 1 + s + .. + s**order / order!, where s = q·k / sqrt(dim).

    Order 2 gives 1 + dim + dim (dim + 1) / 2 features, and the weight ((1 + s)**2 + 1) / 2 is never below 1/2.

    Args:
        x: queries or keys, (..., dim); both get the same map.
    Raises:
        ValueError: dim 0 or order below 0.
    Source: arXiv:2402.18668, equation 2; there unpacked, see `unpacked_taylor_features`.
    """
    check.at_least("taylor_features", 0, order=order)
    check.at_least("taylor_features", 1, "x needs at least one feature", dim=x.shape[-1])
    return poly_features(x * x.shape[-1] ** -0.25, [1 / math.factorial(i) for i in range(order + 1)])


def unpacked_taylor_features(x: Tensor) -> Tensor:
    """The order-2 map as the paper writes it, every product x_i x_j apart: (..., 1 + dim + dim**2), the same inner product."""
    x = x * x.shape[-1] ** -0.25
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat((torch.ones_like(x[..., :1]), x, pairs), dim=-1)
