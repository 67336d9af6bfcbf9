"""Which mixer sits at which layer: one description that models are built from and that costs are counted on."""

from __future__ import annotations

from typing import NamedTuple

from memlens import check

__all__ = ["KINDS", "MixerSpec", "based_spec"]

KINDS = ("softmax", "window", "linear", "conv", "mamba")


class MixerSpec(NamedTuple):
    """One sequence mixer of a width-`d` decoder. Fields that a kind does not use are left at their defaults."""

    kind: str  # softmax | window | linear | conv | mamba
    d: int = 64
    heads: int = 1
    window: int = 0  # window: keys that a query sees, itself included
    feature_dim: int = 0  # linear: width of q and k, before the Taylor map
    states: int = 0  # mamba: numbers that each channel keeps
    expand: int = 1  # conv, mamba: channels / d
    kernel: int = 0  # short convolution: taps; 0 has none

    @property
    def name(self) -> str:
        """`window 16`, `linear 8`: the kind with the one number that sizes it."""
        size = {"window": self.window, "linear": self.feature_dim, "mamba": self.states}.get(self.kind)
        return self.kind if size is None else f"{self.kind} {size}"


def based_spec(
    layers: int = 27, window: int = 64, feature_dim: int = 16, *, d: int = 1024, heads: int = 16
) -> list[MixerSpec]:
    """Based's layer list: linear attention at 1, 6, 11, .., the window right after it, gated short convolutions elsewhere.

    Args:
        layers: how many; the linear layers are every fifth from index 1 while at least 4 layers follow.
        window, feature_dim: what dials the size of the state; 64 (the 360M configuration uses 256) and 16.
    Returns:
        27 layers: linear at 1, 6, 11, 16, 21, window at 2, 7, 12, 17, 22.
    Raises:
        ValueError: a size below 1.
    Source: arXiv:2402.18668, section 4, and the 360M configuration in HazyResearch/based.
    """
    check.at_least("based_spec", 1, layers=layers, window=window, feature_dim=feature_dim, d=d, heads=heads)
    conv = MixerSpec("conv", d, expand=4, kernel=3)
    linear = MixerSpec("linear", d, heads, feature_dim=feature_dim)
    swa = MixerSpec("window", d, heads, window=window)
    starts = set(range(1, layers - 4, 5))
    return [linear if i in starts else swa if i - 1 in starts else conv for i in range(layers)]
