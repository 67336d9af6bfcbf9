"""Block-sparse attention equals dense attention under the mask spread out, and does not touch what it skips."""

from functools import partial

import pytest
import torch

from memlens.attention import fused
from memlens.attention.exact import attend
from memlens.attention.sparse import block_attend, spread

SHAPE = (2, 4, 2, 100, 130, 16, 24)
CAUSAL = pytest.mark.parametrize("causal", [True, False])


@pytest.mark.parametrize("form", ["reference", "fused", "tiles"])
@pytest.mark.parametrize("shared", [(1, 1), (2, 4), (1, 4), (2, 1)])
@CAUSAL
def test_is_dense_attention_under_the_mask(form, shared, causal, qkv, through, generator, assert_close, monkeypatch):
    if form == "tiles":
        monkeypatch.setattr(fused, "serves", lambda *tensors: False)
    inputs = qkv(*SHAPE, dtype=torch.float64)
    blocks = torch.rand(*shared, 4, 5, generator=generator) < 0.5
    blocks[..., 2, :] = False  # a block of queries that sees nothing
    mask = spread(blocks, 32, 30, 100, 130)
    want = through(partial(attend, causal=causal, mask=mask, return_lse=True), *inputs)
    name = "reference" if form == "reference" else "torch"
    got = through(partial(block_attend, block_mask=blocks, block_q=32, block_k=30, causal=causal, form=name), *inputs)
    assert_close(got, want)


@CAUSAL
def test_all_blocks_are_exact_attention(causal, qkv, through, assert_close):
    inputs = qkv(1, 2, 1, 65, 65, 16)
    blocks = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    got = through(partial(block_attend, block_mask=blocks, block_q=32, block_k=16, causal=causal), *inputs)
    assert_close(got, through(partial(attend, causal=causal, return_lse=True), *inputs))


def test_what_is_skipped_is_not_read(qkv):
    q, k, v = qkv(1, 1, 1, 32, 64, 8)
    k[:, :, 16:32], v[:, :, 16:32] = torch.nan, torch.nan
    blocks = torch.tensor([[True, False, True, True]])[None, None]
    out, lse = block_attend(q, k, v, blocks, block_q=32, block_k=16, causal=False)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_refusals(qkv):
    q, k, v = qkv(1, 2, 2, 32, 32, 8)
    call = partial(block_attend, q, k, v, block_q=16, block_k=16)
    with pytest.raises(ValueError, match=r"block_mask has shape \(1, 1, 3, 2\); expected \(1 or 1, 1 or 2, 2, 2\)"):
        call(torch.ones(1, 1, 3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"block_mask is torch.float32"):
        call(torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"kv_heads=2"):
        block_attend(q[:, :1], k, v, torch.ones(1, 1, 2, 2, dtype=torch.bool), block_q=16, block_k=16)
