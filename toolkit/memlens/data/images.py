"""1,797 handwritten digits, 8 by 8, as one safetensors file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from memlens.data import cards

__all__ = ["Digits", "digits"]


class Digits(NamedTuple):
    images: Tensor  # (1797, 8, 8) float32 in [0, 1]: ink, 17 levels
    labels: Tensor  # (1797,) int64, 0..9


def digits() -> Digits:
    """The digits in their published order; the last 297 are commonly held out. No scikit-learn is needed.

    Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak), test part.
    """
    from safetensors.torch import load

    stored = load(cards.verified("digits", "digits.safetensors"))
    return Digits(stored["images"].float() / 16, stored["labels"].long())
