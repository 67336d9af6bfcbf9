"""Which form of a block runs: the readable reference, vectorised torch, or the Triton kernel.

`auto` is a table anybody can read with `explain`; it never falls back in silence: asking for Triton where it cannot run
raises, with the reason and the way out.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from memlens import check

__all__ = ["FORMS", "OPERATIONS", "Choice", "choose", "explain", "triton_problem"]

FORMS = ("reference", "torch", "triton", "auto")
OPERATIONS = {  # whether it has a kernel
    "affine_quantize": True,
    "attend": True,
    "attend_pruned": True,
    "block_attend": True,
    "coded_direction": True,
    "column_mass": True,
    "decode_observe": True,
    "hit_curve": False,
    "linear_attention": True,
    "nearest_by_cosine": True,
    "packed_attend": True,
    "prefix_attend": True,
    "segment_sums": False,
    "selective_scan": False,
    "shadow_decode": False,
    "sparf": False,
    "taylor_attention": True,
}
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    form: str  # "reference" | "torch" | "triton"
    reason: str


def interpreting() -> bool:
    """True where Triton kernels run in the interpreter (TRITON_INTERPRET=1, set before the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_problem(*tensors: Tensor) -> str:
    """Why a Triton kernel cannot take these tensors; empty where it can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton, on Linux)"
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if odd := [str(d) for d in dtypes if d not in KERNEL_DTYPES]:
        return f"the kernels take float32, float16 and bfloat16, not {', '.join(odd)}; cast the inputs or use form='torch'"
    if interpreting():
        if torch.bfloat16 in dtypes:
            return "the interpreter computes bfloat16 products wrongly; use float32 or float16 there"
        return ""
    if devices := {t.device.type for t in tensors} - {"cuda"}:
        return (
            f"tensors are on {', '.join(sorted(devices))} and no interpreter is switched on; move them to a GPU, "
            "use form='torch', or start Python with TRITON_INTERPRET=1"
        )
    return ""


def explain(op: str, *tensors: Tensor, kernel: bool = True) -> Choice:
    """The form that `auto` picks for these tensors, and why; `kernel=False` for a call that the kernel does not take.

    Raises:
        ValueError: an operation that is not in `OPERATIONS`, naming the nearest.
    """
    check.one_of("explain", OPERATIONS, operation=op)
    return _auto(op, tensors, kernel and OPERATIONS[op])


def _without(op: str) -> str:
    return f"the kernel of {op} does not take this call" if OPERATIONS.get(op) else f"{op} has no kernel"


def _auto(op: str, tensors: tuple[Tensor, ...], kernel: bool) -> Choice:
    if not kernel:
        return Choice("torch", _without(op))
    devices = {t.device.type for t in tensors} - {"cuda"}
    if devices or not tensors:
        return Choice("torch", f"tensors are on {', '.join(sorted(devices)) or 'no device'}")
    if problem := triton_problem(*tensors):
        return Choice("torch", problem)
    return Choice("triton", "tensors are on a GPU and the kernel takes their dtype")


def choose(op: str, form: str, *tensors: Tensor, kernel: bool = True) -> str:
    """Resolve `form` to "reference", "torch" or "triton" for these tensors.

    Raises:
        ValueError: an unknown form, or `triton` where no kernel takes the call.
        RuntimeError: `triton` where it cannot run, saying why and what to do.
    """
    check.one_of(op, FORMS, form=form)
    if form == "auto":
        return _auto(op, tensors, kernel).form
    if form == "triton":
        if not kernel:
            check.fail(op, "form='triton'", "a form that exists", f"{_without(op)}; use form='torch'")
        if problem := triton_problem(*tensors):
            raise RuntimeError(f"{op}: form='triton' cannot run: {problem}")
    return form
