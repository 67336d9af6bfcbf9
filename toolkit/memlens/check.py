"""Argument checks for every public door: what came, what was expected, the way out.

Each function takes the name of the operation first. Messages have one form:
`attend: k has shape (1, 3, 5, 8); expected (batch=2, kv_heads, k_len, dim) ...`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["at_least", "divides", "fail", "finite", "layout", "nearest", "one_of", "same_dtype", "shapes", "within"]


def fail(op: str, what: str, expected: str, fix: str = "", *, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` with the one message form: operation, what came, what was expected, the way out."""
    raise error(f"{op}: {what}; expected {expected}" + (f"; {fix}" if fix else ""))


_suspected: set[str] = set()  # operations that `layout` has warned about


@lru_cache(maxsize=512)
def _axes(spec: str) -> tuple[bool, tuple[str, ...]]:
    names = tuple(spec.split())
    return (True, names[1:]) if names and names[0] == "..." else (False, names)


def shapes(op: str, **tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Match each tensor against named axes and return the sizes, e.g. `{"batch": 2, "heads": 4}`.

    A name that comes twice must have one size; a number is that size; a leading `...` takes any leading axes; a
    tensor that is None is skipped.

    >>> import torch
    >>> shapes("demo", x=(torch.zeros(2, 3), "rows cols"), y=(torch.zeros(3), "cols"))
    {'rows': 2, 'cols': 3}

    Raises:
        TypeError: a value that is no tensor.
        ValueError: a wrong rank or a size that disagrees, with every shape that was passed.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, spec) in tensors.items():
        if tensor is None:
            continue
        shape = getattr(tensor, "shape", None)
        if shape is None:
            fail(op, f"{name} is {type(tensor).__name__}", f"a tensor ({spec})", error=TypeError)
        leading, axes = _axes(spec)
        if leading:
            shape = shape[len(shape) - len(axes) :] if len(shape) >= len(axes) else ()
        if len(shape) != len(axes):
            _shape_error(op, name, tensors, sizes)
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, int(axis) if axis.isdigit() else size) != size:
                _shape_error(op, name, tensors, sizes)
    return {axis: size for axis, size in sizes.items() if not axis.isdigit()}


def _shape_error(op: str, name: str, tensors: Mapping, sizes: Mapping[str, int]) -> NoReturn:
    tensor, spec = tensors[name]
    wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes and not axis.isdigit() else axis for axis in spec.split())
    others = ", ".join(f"{key} {tuple(value.shape)}" for key, (value, _) in tensors.items() if value is not None)
    fail(op, f"{name} has shape {tuple(tensor.shape)}", f"({wanted})", f"all arguments: {others}")


def divides(op: str, **pair: int) -> None:
    """Refuse two sizes of which the first is no divisor of the second: `divides(op, kv_heads=3, heads=9)`."""
    (small, few), (large, many) = pair.items()
    if few < 1 or many % few:
        fail(
            op,
            f"{large}={many} is no multiple of {small}={few}",
            f"{small} to divide {large}",
            f"change {small} or repeat it",
        )


def finite(op: str, **tensors: Tensor | None) -> None:
    """Refuse NaN and infinity, naming the first bad index."""
    for name, tensor in tensors.items():
        if tensor is None or not tensor.is_floating_point():
            continue
        if not bool(tensor.sum().isfinite()) and not bool((good := tensor.isfinite()).all()):
            index = tuple((~good).nonzero()[0].tolist())
            value = tensor[index].item()
            fail(
                op,
                f"{name}{list(index)} is {value}",
                "finite numbers",
                "look at what produced it (a masked row, an overflow)",
            )


def within(op: str, low: float, high: float, **values: float | Tensor | None) -> None:
    """Refuse numbers or tensors outside [low, high]; NaN is outside."""
    for name, value in values.items():
        if value is None:
            continue
        if hasattr(value, "amin"):
            if value.numel() == 0:
                continue
            least, most = (bound.item() for bound in value.detach().aminmax())
        else:
            least = most = value
        if not (least >= low and most <= high):
            came = f"{name}={least}" if least == most else f"{name} spans {least:.4g} to {most:.4g}"
            fail(op, came, f"{name} within [{low}, {high}]")


def at_least(op: str, low: int, fix: str = "", **values: int) -> None:
    """Refuse integers below `low`."""
    for name, value in values.items():
        if value < low:
            fail(op, f"{name}={value}", f"{name} >= {low}", fix)


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Refuse a mix of dtypes, naming each."""
    present = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(present.values())) > 1:
        came = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in present.items())
        fail(op, f"mixed dtypes ({came})", "one dtype", "cast them with .to(q.dtype)")


def nearest(word: str, options: Iterable[str]) -> str:
    """`did you mean 'h2o'?` for the closest option, else the first few options."""
    options = sorted(options)
    close = get_close_matches(word, options, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "known: " + ", ".join(options[:12]) + (" ..." if len(options) > 12 else "")


def one_of(op: str, options: Iterable[str], **values: str) -> None:
    """Refuse a word that is not among the options and name the nearest."""
    options = tuple(options)
    for name, value in values.items():
        if value not in options:
            fail(op, f"{name}={value!r}", "one of " + ", ".join(map(repr, options)), nearest(str(value), options))


def layout(op: str, heads: int, length: int) -> None:
    """Warn, once for an operation, when it seems to have been passed (batch, length, heads, dim)."""
    if heads > length > 1 and heads > 64 and op not in _suspected:
        _suspected.add(op)
        warnings.warn(
            f"{op}: heads={heads} exceeds length={length}; memlens takes (batch, heads, length, dim). "
            "Tensors laid out as (batch, length, heads, dim) convert with memlens.layout.from_fla",
            stacklevel=3,
        )
