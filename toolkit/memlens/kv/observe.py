"""One decoding step that also says how much each held token was attended to, from the scores that attention computes anyway.

    s_j = scale · q·k_j      lse = log Σ_j exp(s_j)      out = Σ_j exp(s_j - lse) v_j      score_j += exp(s_j - lse)

`column_mass` would read every key a second time. Source: arXiv:2306.14048 (the running score of H2O, one row at a time).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memlens import backend, check
from memlens.attention.exact import attend
from memlens.attention.merge import Attended, merge_many
from memlens.kv.score import GROUPS, column_mass, group_heads

__all__ = ["Observed", "attend_alive", "decode_observe", "merge_observed"]


class Observed(NamedTuple):
    out: Tensor  # (B, H, 1, Dv), dtype of q
    lse: Tensor  # (B, H, 1), float32; -inf where no key is alive
    score: Tensor  # (B, Hkv, L), float32; (B, H, L) with group="none"


@torch.no_grad()
def decode_observe(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor | None = None, *, group: str = "mean", alive: Tensor | None = None,
    scale: float | None = None, form: str = "auto",
) -> Observed:  # fmt: skip
    """Attention of one new row, with `score` plus the probability that each key got: `Observed(out, lse, score)`.

    The given score is not changed. No gradient flows.

    Args:
        q: (B, H, 1, D), the newest row, which sees every key that is alive.
        k, v: (B, Hkv, L, D) and (B, Hkv, L, Dv); Hkv divides H.
        score: float32, of the result's shape; None starts at zero.
        group: over the query heads of a kv head, as in `column_mass`: mean | max | sum | none.
        alive: (B, Hkv, L) bool; False takes a key out of the softmax (padding).
        scale: of the scores, default D ** -0.5.
        form: "reference" (attention, then `column_mass`), "torch" (one product), "triton" (split over the keys), "auto".
    Raises:
        ValueError: shapes that disagree, more than one row, an unknown word, what the kernel does not take.
        RuntimeError: form="triton" where it cannot run, saying why.
    """
    op = "decode_observe"
    check.one_of(op, GROUPS, group=group)
    sizes = check.shapes(
        op, q=(q, "batch heads rows dim"), k=(k, "batch kv_heads k_len dim"), v=(v, "batch kv_heads k_len value_dim"),
        alive=(alive, "batch kv_heads k_len"),
        score=(score, "batch heads k_len" if group == "none" else "batch kv_heads k_len"),
    )  # fmt: skip
    check.divides(op, kv_heads=sizes["kv_heads"], heads=sizes["heads"])
    if sizes["rows"] != 1:
        check.fail(op, f"{sizes['rows']} rows", "the newest row alone", "use attend, and column_mass with its lse")
    check.at_least(op, 1, k_len=sizes["k_len"])
    why = _problem(q, v, k.shape[1])
    if why and form == "triton":
        check.fail(op, why, "what the kernel takes", "use form='torch'")
    run = _FORMS[backend.choose(op, form, q, k, v, kernel=not why)]
    return run(q, k, v, score, group, alive, q.shape[-1] ** -0.5 if scale is None else float(scale))


def merge_observed(parts: Sequence[Observed]) -> Observed:
    """One row's attention over disjoint key sets; the scores (B, H, L), of `group="none"`, are laid end to end.

    A key's probability shrinks by exp(lse of its part - lse of all), as its part's output does in `merge_many`.
    """
    out, lse = merge_many([part[:2] for part in parts])
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    return Observed(out, lse, torch.cat([part.score * (part.lse - shift).exp() for part in parts], -1))


def attend_alive(
    q: Tensor, k: Tensor, v: Tensor, *, alive: Tensor | None = None, scale: float | None = None, form: str = "auto",
    tally: bool = False,
) -> Attended | Observed:  # fmt: skip
    """Every row of q on every key that is alive, (B, Hkv, L); with `tally` a single row, and what each key got by head."""
    if tally and k.shape[2]:
        return decode_observe(q, k, v, group="none", alive=alive, scale=scale, form=form)
    mask = None if alive is None else alive.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
    found = attend(q, k, v, causal=False, mask=mask, scale=scale, return_lse=True, form=form)
    return Observed(*found, found.lse.new_zeros(*q.shape[:2], 0)) if tally else found


def _problem(q: Tensor, v: Tensor, kv_heads: int) -> str:
    most, group = max(q.shape[-1], v.shape[-1]), q.shape[1] // kv_heads
    return (
        "" if most <= 256 and group <= 64 else f"dim {most}, {group} heads a kv head; the kernel takes at most 256 and 64"
    )


def _plus(score: Tensor | None, mass: Tensor) -> Tensor:
    return mass if score is None else score + mass


def _reference(q, k, v, score: Tensor | None, group: str, alive: Tensor | None, scale: float) -> Observed:
    mask = None if alive is None else alive.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
    out, lse = attend(q, k, v, causal=False, mask=mask, scale=scale, return_lse=True, form="reference")
    return Observed(out, lse, _plus(score, column_mass(q, k, group=group, alive=alive, scale=scale, form="reference")))


def _torch(q, k, v, score: Tensor | None, group: str, alive: Tensor | None, scale: float) -> Observed:
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = (q.to(wide) * scale).unflatten(1, (k.shape[1], -1))[..., 0, :]  # (B, Hkv, g, D)
    s = rows @ k.to(wide).transpose(-1, -2)
    if alive is not None:
        s.masked_fill_(~alive[:, :, None], -torch.inf)
    lse = s.logsumexp(-1)
    p = s.sub_(lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp_()
    out = (p @ v.to(wide)).flatten(1, 2)[:, :, None].to(q.dtype)
    mass = group_heads(p.flatten(1, 2).float(), k.shape[1], group)
    return Observed(out, lse.flatten(1, 2)[..., None], _plus(score, mass))


def _triton(q, k, v, score: Tensor | None, group: str, alive: Tensor | None, scale: float) -> Observed:
    from memlens_kernels.decode_observe import add_observed, decode_parts

    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]).contiguous()
    alive = None if alive is None else alive.contiguous()
    outs, lses, s = decode_parts(rows, k, v, alive=alive, scale=scale)
    out, lse = merge_many(list(zip(outs, lses, strict=True)))
    score = None if score is None else score.float().contiguous()
    return Observed(
        out.flatten(1, 2)[:, :, None], lse.flatten(1, 2)[..., None],
        add_observed(s, lse.contiguous(), score, group).reshape(q.shape[0], -1, k.shape[2]),
    )  # fmt: skip


_FORMS = {"reference": _reference, "torch": _torch, "triton": _triton}
