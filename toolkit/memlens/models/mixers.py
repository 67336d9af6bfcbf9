"""Sequence mixers for `TinyLM`, each built from a `MixerSpec`: thin modules over the functions of memory and attention.

    layers = [Layer(mixer=mixer(spec), ffn=None) for spec in specs]

Softmax, window and linear mixers pass q, k and v through a causal convolution of a few taps: it lets a token see its neighbour, which
is what makes recall learnable in a few hundred steps. Weights that `TinyLM` does not draw start where they are documented below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from memlens import check
from memlens.attention.exact import attend
from memlens.attention.masks import stream_mask
from memlens.attention.rope import frequencies, rope
from memlens.memory.based import taylor_attention
from memlens.memory.hybrid import KINDS, MixerSpec
from memlens.memory.ssm import MambaParams, gated_short_conv, mamba_mixer, short_conv

__all__ = ["GatedConv", "Mamba", "ShortConv", "SoftmaxMixer", "TaylorMixer", "mixer"]


class ShortConv(nn.Module):
    """`short_conv` with its weight, which starts uniform within 1 / sqrt(taps)."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return short_conv(x, self.weight)[0]


class _Projected(nn.Module):
    """Projections to q, k and v with a short convolution on each, and back from the heads' outputs."""

    def __init__(self, d: int, heads: int, key_dim: int, kernel: int):
        super().__init__()
        check.divides("mixer", heads=heads, d=d)
        check.at_least("mixer", 1, key_dim=key_dim)
        self.heads = heads
        widths = {"q": heads * key_dim, "k": heads * key_dim, "v": d}
        self.proj = nn.ModuleDict({name: nn.Linear(d, width, bias=False) for name, width in widths.items()})
        self.conv = nn.ModuleDict({name: ShortConv(width, kernel) for name, width in widths.items()} if kernel else {})
        self.o = nn.Linear(d, d, bias=False)

    def qkv(self, x: Tensor) -> list[Tensor]:
        """q, k and v as (batch, heads, length, dim)."""
        streams = []
        for name, proj in self.proj.items():
            stream = proj(x)
            stream = self.conv[name](stream) if name in self.conv else stream
            streams.append(stream.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        return streams

    def join(self, out: Tensor) -> Tensor:
        return self.o(out.transpose(1, 2).flatten(-2))


class SoftmaxMixer(_Projected):
    """Causal softmax attention with rotary positions, over all tokens or over the last `window` (its own included)."""

    def __init__(self, d: int, heads: int, *, window: int | None = None, kernel: int = 4, theta: float = 10_000.0):
        super().__init__(d, heads, d // heads, kernel)
        if window is not None:
            check.at_least("SoftmaxMixer", 1, window=window)
        self.window = window
        self.register_buffer("inv_freq", frequencies(d // heads, theta=theta), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        length = x.shape[1]
        pos = torch.arange(length, device=x.device)
        q, k = (rope(m, pos, self.inv_freq) for m in (q, k))
        mask = None if self.window is None else stream_mask(length, length, sink=0, recent=self.window, device=x.device)
        return self.join(attend(q, k, v, mask=mask))


class TaylorMixer(_Projected):
    """Based's linear attention: q and k of `feature_dim`, the order-2 Taylor map, normalised, without decay or rotary positions."""

    def __init__(self, d: int, heads: int, *, feature_dim: int = 16, kernel: int = 4):
        super().__init__(d, heads, feature_dim, kernel)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.join(taylor_attention(q, k, v)[0])


class GatedConv(nn.Module):
    """Based's local layer: a short convolution between two products, `expand` times as wide as the model."""

    def __init__(self, d: int, heads: int, *, expand: int = 4, kernel: int = 3):
        super().__init__()
        self.w_in, self.w_out = nn.Linear(d, 3 * expand * d, bias=False), nn.Linear(expand * d, d, bias=False)
        self.conv = ShortConv(expand * d, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return gated_short_conv(x, self.w_in.weight, self.conv.weight, self.w_out.weight)[0]


class Mamba(nn.Module):
    """`mamba_mixer` with its weights: A starts at -1 .. -states, steps at 0.001 to 0.1, log-uniform by channel."""

    def __init__(self, d: int, heads: int, *, states: int = 16, expand: int = 1, kernel: int = 4):
        super().__init__()
        check.at_least("Mamba", 1, states=states, expand=expand, kernel=kernel)
        wide, rank = expand * d, math.ceil(d / 16)
        self.in_proj, self.out_proj = nn.Linear(d, 2 * wide, bias=False), nn.Linear(wide, d, bias=False)
        self.x_proj, self.dt_proj = nn.Linear(wide, rank + 2 * states, bias=False), nn.Linear(rank, wide, bias=False)
        self.conv, self.conv_bias = ShortConv(wide, kernel), nn.Parameter(torch.zeros(wide))
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(wide, 1))
        self.D = nn.Parameter(torch.ones(wide))
        step = torch.logspace(-3, -1, wide)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def params(self) -> MambaParams:
        return MambaParams(
            self.in_proj.weight, self.conv.weight, self.conv_bias, self.x_proj.weight, self.dt_proj.weight, self.dt_bias,
            self.A_log, self.D, self.out_proj.weight,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return mamba_mixer(x, self.params())[0]


def mixer(spec: MixerSpec) -> Callable[[int, int], nn.Module]:
    """The factory `Layer.mixer` wants for this spec.

    Raises:
        ValueError: an unknown kind, or a `TinyLM` whose width or heads are not the spec's.
    """
    check.one_of("mixer", KINDS, kind=spec.kind)
    make = {
        "softmax": partial(SoftmaxMixer, kernel=spec.kernel),
        "window": partial(SoftmaxMixer, window=spec.window, kernel=spec.kernel),
        "linear": partial(TaylorMixer, feature_dim=spec.feature_dim, kernel=spec.kernel),
        "conv": partial(GatedConv, expand=spec.expand, kernel=spec.kernel),
        "mamba": partial(Mamba, states=spec.states, expand=spec.expand, kernel=spec.kernel),
    }[spec.kind]

    def build(d: int, heads: int) -> nn.Module:
        if (d, heads) != (spec.d, spec.heads):
            check.fail("mixer", f"d={d}, heads={heads}", f"the spec's d={spec.d}, heads={spec.heads}")
        return make(d, heads)

    return build
