"""Numbers as a person writes them, on ticks, bars and cells."""

from __future__ import annotations

import numpy as np

__all__ = ["short", "ticks_at"]

FEW_TICKS = 9
LEAST_STEP = 0.3  # between neighbours, in natural logarithms


def short(value: float, digits: int = 3) -> str:
    """A number as a person writes it: 4096, 0.125, 1.5M, 2e-05.

    >>> short(4096), short(1_500_000), short(0.000021)
    ('4096', '1.5M', '2.1e-05')
    """
    if abs(value) >= 1e5 and np.isfinite(value):
        for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.{digits}g}{unit}"
    return f"{value:.0f}" if value == round(value) else f"{value:.{digits}g}"


def ticks_at(values: np.ndarray) -> list[tuple[float, str]] | None:
    """The measured values as ticks of a log axis, if they are few, apart and can be written in full; else None.

    >>> ticks_at(np.array([1024, 16384, 262144]))
    [(1024.0, '1024'), (16384.0, '16384'), (262144.0, '262144')]
    >>> ticks_at(np.array([1.23456, 2.34567]))
    """
    found = np.unique(np.asarray(values, float))
    if not 0 < len(found) <= FEW_TICKS or found[0] <= 0 or (np.diff(np.log(found)) < LEAST_STEP).any():
        return None
    names = [f"{value:.0f}" if value == round(value) and value < 1e6 else f"{value:.4g}" for value in found]
    return list(zip(found.tolist(), names)) if all(map(_same, names, found)) else None


def _same(name: str, value: float) -> bool:
    return float(name) == value
