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

__all__ = ["FORMS", "Choice", "choose", "explain", "triton_problem"]

FORMS = ("reference", "torch", "triton", "auto")
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
    """The form that `auto` picks for these tensors, and why."""
    if not kernel:
        return Choice("torch", f"{op} has no kernel")
    if not tensors or any(t.device.type != "cuda" for t in tensors):
        return Choice("torch", "tensors are on the CPU")
    if problem := triton_problem(*tensors):
        return Choice("torch", problem)
    return Choice("triton", "tensors are on a GPU and the kernel takes their dtype")


def choose(op: str, form: str, *tensors: Tensor, kernel: bool = True) -> str:
    """Resolve `form` to "reference", "torch" or "triton" for these tensors.

    Raises:
        ValueError: an unknown form, or `triton` for an operation without a kernel.
        RuntimeError: `triton` where it cannot run, saying why and what to do.
    """
    check.one_of(op, FORMS, form=form)
    if form == "auto":
        return explain(op, *tensors, kernel=kernel).form
    if form == "triton":
        if not kernel:
            check.fail(op, "form='triton'", "a form that exists", f"{op} has no kernel; use form='torch'")
        if problem := triton_problem(*tensors):
            raise RuntimeError(f"{op}: form='triton' cannot run: {problem}")
    return form
