"""K-sort: keys in block floating point, after their channels were sorted so that large ones share an exponent.

    perm = argsort of the row norms of W_k, per kv head, largest first; W_q's heads that read it get the same
    q·k is unchanged, and a block's step, set by its largest channel, no longer drowns small channels beside an outlier

The order is known before inference, so nothing is paid for it at run time. Rotary positions turn channels in pairs; a
permuted projection therefore takes a permuted table (`RopeTable`), which names each channel's partner.

Source: arXiv:2403.20137. How it meets rotary positions is not in the paper; here any order is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from memlens import check
from memlens.attention.merge import Attended
from memlens.kv import storage
from memlens.quant import core
from memlens.quant.blockfloat import Blocks, decode, encode

if TYPE_CHECKING:
    from memlens.kv.policies import Policy

__all__ = [
    "BlockFloats", "BlockState", "RopeTable", "apply_channel_permutation", "block_floats", "ksort", "logit_error",
    "rope_table", "rotate",
]  # fmt: skip


def ksort(model_or_weights: nn.Module | Sequence[Tensor], kv_heads: int | None = None) -> Tensor:
    """The order of the key channels, (layers, Hkv, D) int64: channel j of the sorted head is channel perm[j] of the old.

    Args:
        model_or_weights: a Hugging Face model, or the key projections (Hkv·D, hidden) of its layers.
        kv_heads: needed with weights.
    Raises:
        ValueError: weights without kv_heads, or rows that kv_heads does not divide.
    """
    if isinstance(model_or_weights, nn.Module):
        from memlens.models.hooks import attention_modules

        modules = attention_modules(model_or_weights)
        kv_heads = model_or_weights.config.get_text_config().num_key_value_heads
        weights = [modules[layer].k_proj.weight.detach() for layer in sorted(modules)]
    else:
        weights = list(model_or_weights)
    check.at_least("ksort", 1, "say how many kv heads the rows belong to", kv_heads=kv_heads or 0, layers=len(weights))
    check.divides("ksort", kv_heads=kv_heads, rows=weights[0].shape[0])
    norms = torch.stack([w.float().norm(dim=1).view(kv_heads, -1) for w in weights])
    return norms.sort(dim=-1, descending=True, stable=True).indices


class RopeTable(NamedTuple):
    """Rotary positions channel by channel: out_c = x_c cos(p f_c) + sign_c x_partner(c) sin(p f_c)."""

    freq: Tensor  # (..., D) radians per position
    partner: Tensor  # (..., D) int64
    sign: Tensor  # (..., D), -1 or 1


def rope_table(inv_freq: Tensor) -> RopeTable:
    """The table of ordinary rotary positions (layout "half" of `attention.rope`), (D,) each, from inv_freq (D / 2,)."""
    half = inv_freq.shape[-1]
    channel = torch.arange(2 * half, device=inv_freq.device)
    sign = torch.where(channel < half, -1.0, 1.0)
    return RopeTable(inv_freq.repeat(2), (channel + half) % (2 * half), sign)


def rotate(x: Tensor, pos: Tensor, table: RopeTable) -> Tensor:
    """x (..., L, D) turned for positions pos (L,); tables of (heads, D) turn each head of (..., heads, L, D) by its own."""
    freq, partner, sign = (part[..., None, :] for part in table)
    angle = pos.to(freq.dtype)[:, None] * freq
    return x * angle.cos() + sign * x.gather(-1, partner.expand(x.shape)) * angle.sin()


def apply_channel_permutation(wq: Tensor, wk: Tensor, perm: Tensor, table: RopeTable) -> tuple[Tensor, Tensor, RopeTable]:
    """W_q, W_k and the rotary table of a layer whose key channels stand in another order; every q·k stays what it was.

    Args:
        wq: (H·D, hidden); wk: (Hkv·D, hidden).
        perm: (Hkv, D), as from `ksort`; the query heads of a kv head follow it.
        table: (D,), as from `rope_table`.
    Returns:
        new wq and wk, and a table of (Hkv, D).
    Raises:
        ValueError: rows that do not divide into heads, or a perm that is none.
    """
    kv_heads, dim = check.shapes("apply_channel_permutation", perm=(perm, "kv_heads dim")).values()
    if not torch.equal(perm.sort(-1).values, torch.arange(dim, device=perm.device).expand_as(perm)):
        check.fail("apply_channel_permutation", "a channel twice or never", "each channel once in every head")
    check.divides("apply_channel_permutation", dim=kv_heads * dim, rows_of_wq=wq.shape[0])
    check.divides("apply_channel_permutation", dim=kv_heads * dim, rows_of_wk=wk.shape[0])
    keys = wk.view(kv_heads, dim, -1).gather(1, perm[..., None].expand(-1, -1, wk.shape[1]))
    heads = wq.view(kv_heads, -1, dim, wq.shape[1])
    queries = heads.gather(2, perm[:, None, :, None].expand(-1, heads.shape[1], -1, wq.shape[1]))
    partner = perm.argsort(-1).gather(-1, table.partner[perm])
    return queries.reshape(wq.shape), keys.reshape(wk.shape), RopeTable(table.freq[perm], partner, table.sign[perm])


def logit_error(q: Tensor, k: Tensor, stored: Tensor) -> float:
    """Norm of the error of every logit q·k, over the norm of the logits, when `stored` stands in for k.

    Args:
        q: (B, H, n, D); k, stored: (B, Hkv, L, D).
    """
    check.shapes("logit_error", k=(k, "batch kv_heads length dim"), stored=(stored, "batch kv_heads length dim"))
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    return float((rows @ (stored - k).mT).norm() / (rows @ k.mT).norm())


class BlockState(NamedTuple):
    k: Tensor  # (B, Hkv, tokens, D·bits/8) uint8, mantissas in the sorted order
    k_exponent: Tensor  # (B, Hkv, tokens, D/block) int8
    v: Tensor  # as k where values are stored in blocks, else (B, Hkv, tokens, D)
    v_exponent: Tensor | None


class BlockFloats(NamedTuple):
    """The format that `block_floats` makes."""

    mantissa: int
    block: int
    values: int | None
    order: Tensor | None  # (layers, Hkv, D), or (Hkv, D) for one layer
    name: str = "block_floats"
    balances: bool = False

    def at(self, layer: int) -> BlockFloats:
        return self if self.order is None or self.order.ndim == 2 else self._replace(order=self.order[layer])

    def problem(self, policy: Policy) -> str:
        return ""

    def commit(self, held: BlockState | None, k: Tensor, v: Tensor, idx: Tensor | None = None, **seen: Any) -> BlockState:
        new = BlockState(*self._stored(self._sorted(k), self.mantissa), *self._stored(v, self.values))
        pairs = zip(held or (None,) * 4, new, strict=True)
        whole = (y if x is None else torch.cat((x, y), 2) for x, y in pairs)
        return BlockState(*(x if x is None or idx is None else storage.take(x, idx) for x in whole))

    def _stored(self, x: Tensor, bits: int | None) -> tuple[Tensor, Tensor | None]:
        if bits is None:
            return storage.own(x), None
        blocks = encode(x, bits, self.block)
        return core.pack(blocks.mantissa, bits), blocks.exponent

    def _sorted(self, k: Tensor, *, back: bool = False) -> Tensor:
        if self.order is None:
            return k
        order = self.order.argsort(-1) if back else self.order
        return k.gather(-1, order[None, :, None].expand(k.shape))

    def count(self, held: BlockState) -> int:
        return held.k.shape[2]

    def read(self, held: BlockState, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dim = held.k_exponent.shape[-1] * self.block
        k = decode(Blocks(core.unpack(held.k, self.mantissa, dim, signed=True), held.k_exponent, self.mantissa), dtype)
        if held.v_exponent is None:
            return self._sorted(k, back=True), held.v.to(dtype)
        dim = held.v_exponent.shape[-1] * self.block
        v = decode(Blocks(core.unpack(held.v, self.values, dim, signed=True), held.v_exponent, self.values), dtype)
        return self._sorted(k, back=True), v

    def attend(self, q: Tensor, held: BlockState, *, scale: float | None = None, form: str = "auto") -> Attended:
        return storage.attend_all(self, q, held, scale=scale, form=form)

    def parts(self, held: BlockState) -> dict[str, list[Tensor]]:
        found = storage.by_part(held.k, held.v)
        found["scales"] = [x for x in (held.k_exponent, held.v_exponent) if x is not None]
        return found

    def size(self, shape: tuple[int, int, int, int], itemsize: int = 4) -> dict[str, int]:
        batch, heads, length, dim = shape
        numbers, sides = batch * heads * length * dim, (self.mantissa, self.values)
        each = [numbers * itemsize if bits is None else numbers * core.container(bits) // 8 for bits in sides]
        exponents = [0 if bits is None else numbers // self.block for bits in sides]
        return storage.part_bytes(payload=sum(each), scales=sum(exponents))


def block_floats(mantissa: int = 4, *, block: int = 32, values: int | None = 8, order: Tensor | None = None) -> BlockFloats:
    """Storage of keys in block floating point (BFP12: mantissa 4), values with `values` mantissa bits, None as they are.

    Args:
        mantissa, values: 2 to 8 bits, beside one 8-bit exponent for `block` consecutive channels of a token.
        order: (layers, Hkv, D) from `ksort`: the order in which key channels are put into blocks. A model whose weights
            were permuted needs none; for any other the keys are permuted as they come and back as they are read.
    Raises:
        ValueError: mantissas outside 2..8, a block below 1; at the first tokens, a head dim that block does not divide.
    """
    for bits in (mantissa, *(() if values is None else (values,))):
        check.within("block_floats", 2, 8, mantissa=bits)
    check.at_least("block_floats", 1, block=block)
    return BlockFloats(mantissa, block, values, order)
