"""How much of the cache may stay: tokens per (layer, kv head), sinks and recent window included.

Tokens are the one unit. A ratio or a number of bytes is a view of it: `tokens` turns either into tokens, `ratio_of` and
`bytes_of` turn tokens back. The other functions share one total among layers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memlens import check

if TYPE_CHECKING:
    from memlens.kv.adapter import PolicyCache

__all__ = [
    "Achieved", "achieved", "allocate", "bytes_of", "density_softmax", "prefix_search", "ratio_of", "tokens", "uniform",
]  # fmt: skip

POSITION, SCORE = 4, 4  # bytes that a kept token costs beside its key and value, per kv head: int32 and float32


def bytes_of(count: int, *, layers: int, kv_heads: int, dim: int, itemsize: int = 4, extra: int = POSITION + SCORE) -> int:
    """Bytes of `count` tokens in every (layer, kv head): key and value of `dim` numbers each, and `extra` beside them."""
    return count * layers * kv_heads * (2 * dim * itemsize + extra)


def ratio_of(count: int, length: int) -> float:
    """Share of `length` tokens that `count` is, in [0, 1]."""
    check.at_least("ratio_of", 1, length=length)
    return min(count, length) / length


def tokens(*, length: int, ratio: float | None = None, nbytes: int | None = None, **layout: int) -> int:
    """Tokens per (layer, kv head) for a share of `length`, or for `nbytes` of the cache laid out as in `bytes_of`.

    A ratio rounds half to even; bytes round down, so that what is kept never costs more. At least 1, at most `length`.

    >>> tokens(length=512, ratio=0.2), tokens(length=512, nbytes=1_000_000, layers=30, kv_heads=3, dim=64)
    (102, 21)

    Raises:
        ValueError: both or neither given, a ratio outside (0, 1], or bytes that hold no token.
    """
    check.at_least("tokens", 1, length=length)
    if (ratio is None) == (nbytes is None):
        check.fail("tokens", f"ratio={ratio}, nbytes={nbytes}", "one of the two")
    if ratio is not None:
        if not 0 < ratio <= 1:
            check.fail("tokens", f"ratio={ratio}", "a share in (0, 1]")
        return max(1, min(length, round(ratio * length)))
    one = bytes_of(1, **layout)
    check.at_least("tokens", one, f"a token costs {one} bytes over all layers and heads", nbytes=nbytes)
    return min(length, nbytes // one)


class Achieved(NamedTuple):
    """What a cache really keeps, in the three views of a budget."""

    tokens: tuple[float, ...]  # in every kv head of each layer; their mean where a split gives heads different numbers
    ratio: float  # of the tokens seen, mean over layers
    nbytes: int  # of keys, values, positions and scores, over all layers, heads and rows; as held, not as computed


def achieved(cache: PolicyCache) -> Achieved:
    """The budget that a cache has come to: what was asked for, if its policy keeps its word.

    What a score remembers besides, such as SnapKV's queries, is `cache.nbytes()["memory"]` and not counted here.

    Raises:
        ValueError: a cache that has seen no token.
    """
    check.at_least("achieved", 1, "run a prompt through the cache first", tokens_seen=cache.get_seq_length())
    held = tuple(sum(of) / len(of) if isinstance(of, list) else of for of in cache.held)
    parts = {part: size for part, size in cache.nbytes().items() if part != "memory"}
    return Achieved(held, sum(held) / len(held) / cache.get_seq_length(), sum(parts.values()))


def allocate(weights: Tensor | Sequence[float], total: int, *, low: int = 1, high: int | None = None) -> list[int]:
    """Whole numbers in proportion to `weights` (n,) that sum to `total` exactly, each within [low, high].

    Largest remainder: floors first, then one more to the largest remainders, ties to the lower index. A share beyond a
    bound is set to it and the rest is shared again among the others.

    Raises:
        ValueError: negative, NaN or all-zero weights, or a total that the bounds cannot reach.
    """
    shares = [float(weight) for weight in weights]
    check.at_least("allocate", 1, weights=len(shares))
    check.within("allocate", 0.0, math.inf, weight=min(shares))
    high = total if high is None else high
    if not (low * len(shares) <= total <= high * len(shares)):
        reach = f"{low * len(shares)} to {high * len(shares)} (low={low}, high={high})"
        check.fail("allocate", f"total={total} over {len(shares)} shares", reach, "change the bounds or the total")
    if not math.isfinite(sum(shares)) or sum(shares) == 0:
        check.fail("allocate", f"weights sum to {sum(shares)}", "a positive, finite sum")
    fixed: dict[int, int] = {}
    while True:
        free = [i for i in range(len(shares)) if i not in fixed]
        left, mass = total - sum(fixed.values()), sum(shares[i] for i in free)
        exact = {i: left * (shares[i] / mass if mass else 1 / len(free)) for i in free}
        short, over = [i for i in free if exact[i] < low], [i for i in free if exact[i] > high]
        lacking, spare = sum(low - exact[i] for i in short), sum(exact[i] - high for i in over)
        if not short and not over:
            return _round_up(exact, fixed, left, len(shares))
        # fix the side that is further out: what it takes or gives can only bring the other side closer
        fixed |= dict.fromkeys(short, low) if lacking >= spare else dict.fromkeys(over, high)


def _round_up(exact: dict[int, float], fixed: dict[int, int], left: int, count: int) -> list[int]:
    whole = {i: math.floor(share + 1e-9) for i, share in exact.items()}
    order = sorted(exact, key=lambda i: (-(exact[i] - whole[i]), i))
    for i in order[: left - sum(whole.values())]:
        whole[i] += 1
    return [fixed[i] if i in fixed else whole[i] for i in range(count)]


def uniform(n_layers: int, per_layer: int) -> list[int]:
    """The same number of tokens for every layer."""
    check.at_least("uniform", 1, n_layers=n_layers, per_layer=per_layer)
    return [per_layer] * n_layers


def prefix_search(curves: Tensor, total: int, protect: int = 0) -> list[int]:
    """Tokens per layer that make the smallest retained mass as large as it can be; they sum to `total` exactly.

    One token at a time goes to the layer whose best tokens so far hold the least mass (ties: the lower layer). That is
    the threshold search of the paper carried out exactly, and it only ever adds when `total` grows.

    Args:
        curves: (layers, L), curves[l, k-1] = share of layer l's mass on its best k tokens; rising, at most 1.
        total: over all layers.
        protect: tokens that every layer keeps anyway; they count inside the total.
    Raises:
        ValueError: a falling curve, or total < layers * (protect + 1) or > layers * L.
    Source: arXiv:2412.03409 (PrefixKV), which bisects on one threshold and stops within 5 tokens of the total.
    """
    layers, length = check.shapes("prefix_search", curves=(curves, "layers length")).values()
    check.within("prefix_search", layers * (protect + 1), layers * length, total=total)
    if bool((curves.diff(dim=1) < -1e-6).any()):
        check.fail("prefix_search", "a curve that falls", "cumulated mass, rising along the last axis", "sort, then cumsum")
    rows, counts = curves.tolist(), [protect + 1] * layers
    queue = [(rows[layer][protect], layer) for layer in range(layers)]
    heapq.heapify(queue)
    for _ in range(total - sum(counts)):
        _, layer = heapq.heappop(queue)
        counts[layer] += 1
        mass = rows[layer][counts[layer] - 1] if counts[layer] < length else math.inf
        heapq.heappush(queue, (mass, layer))
    return counts


def density_softmax(var: Tensor, rho: float, floor: float = 0.01, cap: float = 1.0) -> Tensor:
    """Share of the tokens that each layer keeps: clamp(softmax(-F) · n · rho, floor, cap), (n,) float32.

    F is `var` min-max normalised: a layer whose column mass varies little attends densely and keeps more.

    Raises:
        ValueError: a rho outside (0, 1], or floor and cap that are not 0 <= floor <= cap <= 1.
    Source: the layer allocation of arXiv:2406.13035 (D2O), as in its code.
    """
    check.shapes("density_softmax", var=(var, "layers"))
    check.within("density_softmax", 1e-9, 1.0, rho=rho)
    check.within("density_softmax", 0.0, 1.0, floor=floor, cap=cap, gap=cap - floor)
    var = var.float()
    spread = (var.max() - var.min()).clamp(min=torch.finfo(torch.float32).tiny)
    return (-(var - var.min()) / spread).softmax(0).mul(len(var) * rho).clamp(floor, cap)
