"""A gradient seen through a few directions: the subspace, the projection onto it, and the way back.

For a gradient g (m, n) the SHORT side is compressed, so that what is left keeps the long one:

    side "left"  (m < n):   basis (m, r),   low = basisᵀ g   (r, n)
    side "right" (m >= n):  basis (n, r),   low = g basis    (m, r)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlens import check

__all__ = [
    "Subspace",
    "add_unprojected_",
    "energy_rank",
    "gauss_subspace",
    "pick_side",
    "project",
    "svd_subspace",
    "unproject",
]

SIDES = ("auto", "left", "right")


class Subspace(NamedTuple):
    basis: Tensor  # left: (m, r), right: (n, r)
    side: str  # "left" | "right"


def pick_side(m: int, n: int) -> str:
    """The side that is compressed: "right" where m >= n, else "left"."""
    check.at_least("pick_side", 1, m=m, n=n)
    return "right" if m >= n else "left"


def _resolve(op: str, shape: tuple[int, ...], rank: int, side: str) -> tuple[str, int, int]:
    """(side, length of that side, rank capped at the short side)."""
    if len(shape) != 2:
        check.fail(op, f"a gradient of shape {tuple(shape)}", "a matrix (m, n)", "leave vectors and tables to plain Adam")
    check.one_of(op, SIDES, side=side)
    check.at_least(op, 1, rank=rank)
    m, n = shape
    side = pick_side(m, n) if side == "auto" else side
    return side, (m if side == "left" else n), min(rank, m, n)


def svd_subspace(g: Tensor, rank: int, side: str = "auto") -> Subspace:
    """The `rank` leading singular directions of a gradient, orthonormal, with a sign that does not depend on LAPACK.

    The SVD runs in float32 (float64 stays); each column is turned so that its largest |entry| is positive. The basis is
    its own memory: a slice of the SVD's result would keep all of it alive.

    Args:
        g: (m, n), finite.
        rank: at least 1; capped at min(m, n).
        side: "auto" compresses the short side.
    Returns:
        basis (m, r) or (n, r) in g's dtype.
    Raises:
        ValueError: no matrix, sparse, NaN or infinity, rank below 1, an unknown side.
    Source: GaLore, arXiv:2403.03507.
    """
    if g.is_sparse:
        check.fail("svd_subspace", "a sparse gradient", "a dense matrix", "build the embedding with sparse=False")
    side, _, rank = _resolve("svd_subspace", g.shape, rank, side)
    check.finite("svd_subspace", g=g)
    left, _, right = torch.linalg.svd(g.detach().to(torch.promote_types(g.dtype, torch.float32)), full_matrices=False)
    basis = left[:, :rank] if side == "left" else right[:rank].T
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return Subspace((basis * torch.where(largest < 0, -1.0, 1.0)).to(g.dtype).contiguous(), side)


def gauss_subspace(shape: tuple[int, int], rank: int, seed: int, side: str = "auto") -> Subspace:
    """A random subspace with entries N(0, 1/rank), float32 on the CPU, that `seed` alone brings back.

    Args:
        shape: (m, n) of the gradient.
        rank: at least 1; capped at min(m, n).
        seed: any integer; the same one gives the same basis on every machine.
    Raises:
        ValueError: as `svd_subspace`.
    """
    side, length, rank = _resolve("gauss_subspace", shape, rank, side)
    generator = torch.Generator().manual_seed(seed)
    return Subspace(torch.randn(length, rank, generator=generator) / rank**0.5, side)


def project(g: Tensor, sub: Subspace) -> Tensor:
    """The gradient in the subspace: left basisᵀ g (r, n), right g basis (m, r); in g's dtype."""
    check.one_of("project", SIDES[1:], side=sub.side)
    spec = "m n" if sub.side == "right" else "n m"
    check.shapes("project", g=(g, spec), basis=(sub.basis, "n r"))
    basis = sub.basis.to(g.dtype)
    return basis.T @ g if sub.side == "left" else g @ basis


def unproject(low: Tensor, sub: Subspace) -> Tensor:
    """Back to full size (m, n): left basis low, right low basisᵀ; in low's dtype."""
    check.one_of("unproject", SIDES[1:], side=sub.side)
    spec = "m r" if sub.side == "right" else "r m"
    check.shapes("unproject", low=(low, spec), basis=(sub.basis, "n r"))
    basis = sub.basis.to(low.dtype)
    return basis @ low if sub.side == "left" else low @ basis.T


def add_unprojected_(w: Tensor, low: Tensor, sub: Subspace, alpha: float) -> Tensor:
    """`w` plus alpha unproject(low), in place; where the dtypes agree, without a second tensor of its size.

    Raises:
        ValueError: shapes that do not fit.
    """
    check.one_of("add_unprojected_", SIDES[1:], side=sub.side)
    spec, rest = ("n r", "r m") if sub.side == "left" else ("m r", "n r")
    left, right = (sub.basis, low) if sub.side == "left" else (low, sub.basis)
    check.shapes("add_unprojected_", w=(w, "n m" if sub.side == "left" else "m n"), left=(left, spec), right=(right, rest))
    if not w.dtype == low.dtype == sub.basis.dtype:
        return w.add_(unproject(low, sub), alpha=alpha)
    return w.addmm_(left, right if sub.side == "left" else right.T, alpha=alpha)


def energy_rank(g: Tensor, share: float = 0.9) -> int:
    """The smallest rank whose best approximation keeps `share` of the gradient's energy, its squared Frobenius norm.

    Energies are eigenvalues of the short side's Gram matrix, in float32 at least: the squared singular values, at a
    fraction of the time, good to about 1e-6 of the total.

    Args:
        g: (m, n), finite.
        share: above 0, at most 1 - 1e-5.
    Returns:
        0 for a zero gradient, else 1 .. min(m, n).
    Raises:
        ValueError: no matrix, NaN or infinity, a share out of range.
    """
    check.shapes("energy_rank", g=(g, "m n"))
    check.within("energy_rank", 1e-12, 1 - 1e-5, share=share)
    check.finite("energy_rank", g=g)
    wide = g.detach().to(torch.promote_types(g.dtype, torch.float32))
    if not bool(wide.any()):
        return 0
    # unit size first: squares of a gradient underflow float32
    wide = wide / wide.abs().max()
    gram = wide.T @ wide if g.shape[0] > g.shape[1] else wide @ wide.T
    energy = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0).double().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1
