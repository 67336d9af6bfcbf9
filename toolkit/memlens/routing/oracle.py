"""Experts made from a dense feed-forward: its neurons cut into equal groups, and an oracle that picks the best of them.

The oracle scores an expert by what its neurons really write, so it needs the dense activations: results are an upper bound
on any router, labelled "oracle split".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlens import check
from memlens.routing.gate import Gate, mix_experts, top_experts

__all__ = ["Experts", "OracleRouter", "balanced_kmeans", "moefy"]


class Experts(NamedTuple):
    neurons: Tensor  # (expert, hidden) int64, which neurons of the dense feed-forward each expert took
    w_gate: Tensor  # (expert, hidden, dim)
    w_up: Tensor  # (expert, hidden, dim)
    w_down: Tensor  # (expert, dim, hidden)

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        """The sum over the chosen experts, (tokens, dim), for x (tokens, dim) and index (tokens, k)."""
        ones = torch.ones_like(index, dtype=x.dtype)
        return mix_experts(x, Gate(ones, index), self.w_gate, self.w_up, self.w_down)


class OracleRouter(NamedTuple):
    experts: Experts
    top_k: int

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (tokens, expert) and the chosen experts (tokens, k) for x (tokens, dim).

        score_e = sum_{j in e} (silu(gate_j x) * up_j x)^2 * ||down_j||^2, the energy each neuron writes.
        """
        w_gate, w_up, w_down = self.experts[1:]
        energy = (F.silu(x @ w_gate.flatten(0, 1).T) * (x @ w_up.flatten(0, 1).T)).square()
        energy = energy * w_down.square().sum(1).flatten()
        scores = energy.unflatten(-1, w_gate.shape[:2]).sum(-1)
        return scores, top_experts(scores, self.top_k)


def moefy(
    mlp: nn.Module, num_experts: int, top_k: int, *, split: str = "kmeans", generator
) -> tuple[Experts, OracleRouter]:
    """A dense gated feed-forward cut into `num_experts` equal experts, and the oracle router that picks k of them.

    With top_k = num_experts the experts sum to the dense output. Neurons are grouped by balanced k-means on the
    unit-length rows of the gate projection ("kmeans"), or at random.

    Args:
        mlp: down(silu(gate(x)) * up(x)), with linears named gate_proj, up_proj, down_proj or gate, up, down, no bias.
        generator: draws the random split, or the first centroids.
    Raises:
        ValueError: another activation or a bias, num_experts that does not divide the neurons, an unknown split.
    Source: the split follows arXiv:2110.01786, section 3.2.
    """
    check.one_of("moefy", ("kmeans", "random"), split=split)
    gate, up, down = _projections(mlp)
    check.divides("moefy", num_experts=num_experts, neurons=len(gate))
    check.within("moefy", 1, num_experts, top_k=top_k)
    if split == "random":
        neurons = torch.randperm(len(gate), generator=generator).view(num_experts, -1)
    else:
        neurons = balanced_kmeans(F.normalize(gate, dim=-1), num_experts, generator=generator)
    experts = Experts(neurons, gate[neurons], up[neurons], down.T[neurons].transpose(1, 2).contiguous())
    return experts, OracleRouter(experts, top_k)


def _projections(mlp: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    for suffix in ("_proj", ""):
        linears = [getattr(mlp, name + suffix, None) for name in ("gate", "up", "down")]
        if all(isinstance(linear, nn.Linear) for linear in linears):
            break
    else:
        check.fail("moefy", f"{type(mlp).__name__} without gate, up and down linears", "a gated feed-forward")
    probe = torch.linspace(-4, 4, 9)
    act = getattr(mlp, "act_fn", F.silu)
    if any(linear.bias is not None for linear in linears) or not torch.allclose(act(probe), F.silu(probe), atol=1e-6):
        check.fail("moefy", f"{type(mlp).__name__} with a bias or another activation", "silu and no bias")
    return tuple(linear.weight.detach() for linear in linears)


def balanced_kmeans(x: Tensor, clusters: int, *, iters: int = 10, generator) -> Tensor:
    """Row ids (clusters, rows / clusters) of k-means clusters of one size, each sorted.

    Every round gives out (row, cluster) pairs by rising squared distance while the cluster has room, then moves the
    centroids to the means; it stops when nothing moves.
    """
    check.divides("balanced_kmeans", clusters=clusters, rows=len(x))
    centroids, assigned = x[torch.randperm(len(x), generator=generator)[:clusters]], None
    for _ in range(iters):
        previous, assigned = assigned, _give_out(torch.cdist(x, centroids))
        if previous is not None and torch.equal(previous, assigned):
            break
        centroids = x[assigned].mean(1)
    return assigned


def _give_out(distance: Tensor) -> Tensor:
    rows, clusters = distance.shape
    room, members, placed = rows // clusters, [[] for _ in range(clusters)], [False] * rows
    for pair in distance.flatten().argsort(stable=True).tolist():
        row, cluster = divmod(pair, clusters)
        if not placed[row] and len(members[cluster]) < room:
            placed[row] = True
            members[cluster].append(row)
    return torch.tensor(members).sort(-1).values
