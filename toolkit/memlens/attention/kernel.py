"""Autograd around the Triton attention kernels; the kernels and their launchers are in `memlens_kernels.attention`."""

from __future__ import annotations

from torch import Tensor

from memlens import check
from memlens.attention.call import Call, differentiable
from memlens.attention.merge import Attended

__all__ = ["run", "run_blocks"]


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
    """Attention by the kernels, differentiable through out and lse.

    Raises:
        ValueError: a dim over the kernels' limit.
    """
    from memlens_kernels.attention import MAX_DIM

    if (widest := max(q.shape[-1], v.shape[-1])) > MAX_DIM:
        check.fail("attend", f"dim {widest} with form='triton'", f"at most {MAX_DIM}", "use form='torch'")
    if min(q.numel(), k.numel(), v.numel()) == 0:
        from memlens.attention import tiled  # an empty grid cannot be launched

        return differentiable(tiled.forward, tiled.backward, q, k, v, None, call)
    return differentiable(_forward, _backward, q, k, v, None, call)


def _options(call: Call) -> dict:
    return {"scale": call.scale, "causal": call.causal, "offset": call.offset, "mask": call.mask}


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: None, call: Call) -> tuple[Tensor, Tensor]:
    from memlens_kernels.attention import attention_forward

    return attention_forward(q, k, v, **_options(call))


def _backward(q, k, v, bias: None, call: Call, out, lse, dout, dlse) -> tuple[Tensor, Tensor, Tensor, None]:
    from memlens_kernels.attention import attention_backward

    return *attention_backward(q, k, v, out, lse, dout, dlse, **_options(call)), None


def run_blocks(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
    """`block_attend` by the kernels that walk lists of visited blocks.

    Raises:
        ValueError: a dim over the kernels' limit, or blocks that 16 does not divide.
    """
    from memlens_kernels.attention import MAX_DIM

    if (widest := max(q.shape[-1], v.shape[-1])) > MAX_DIM:
        check.fail("block_attend", f"dim {widest} with form='triton'", f"at most {MAX_DIM}", "use form='torch'")
    if call.blocks.block_q % 16 or call.blocks.block_k % 16:
        came = f"block_q={call.blocks.block_q}, block_k={call.blocks.block_k} with form='triton'"
        check.fail("block_attend", came, "multiples of 16", "use form='torch'")
    return differentiable(_block_forward, _block_backward, q, k, v, None, call)


def _block_options(call: Call) -> dict:
    return {"scale": call.scale, "causal": call.causal, "offset": call.offset}


def _block_forward(q: Tensor, k: Tensor, v: Tensor, bias: None, call: Call) -> tuple[Tensor, Tensor]:
    from memlens_kernels.attention_blocks import block_forward

    return block_forward(q, k, v, *call.blocks, **_block_options(call))


def _block_backward(q, k, v, bias: None, call: Call, out, lse, dout, dlse) -> tuple[Tensor, Tensor, Tensor, None]:
    from memlens_kernels.attention_blocks import block_backward

    return *block_backward(q, k, v, out, lse, dout, dlse, *call.blocks, **_block_options(call)), None
