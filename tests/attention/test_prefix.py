"""Attention behind a shared prefix equals attention over the concatenated keys, and so does the model that uses it."""

import pytest
import torch

from memlens.attention import attend, prefix_attend


def group(generator, requests, heads, kv_heads, n, prefix, own, dim=8):
    q = torch.randn(requests, heads, n, dim, generator=generator)
    pre = [torch.randn(kv_heads, prefix, dim, generator=generator) for _ in range(2)]
    mine = [torch.randn(requests, kv_heads, own, dim, generator=generator) for _ in range(2)]
    both = [torch.cat((a.expand(requests, -1, -1, -1), b), 2) for a, b in zip(pre, mine, strict=True)]
    return q, pre, mine, both


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("shape", [(1, 2, 2, 1, 5, 1), (4, 6, 2, 3, 33, 7), (3, 4, 1, 5, 130, 5)])
def test_it_is_attention_over_both(form, shape, generator):
    q, pre, mine, both = group(generator, *shape)
    out, lse = prefix_attend(q, *pre, *mine, return_lse=True, form=form)
    want = attend(q, *both, return_lse=True, form="reference")
    torch.testing.assert_close(out, want.out, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, want.lse, atol=1e-6, rtol=1e-6)


def test_padding_among_the_own_keys(generator, assert_close):
    q, pre, mine, both = group(generator, 2, 4, 2, 2, 9, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :3] = False
    got = prefix_attend(q, *pre, *mine, own_mask=mask)
    seen = torch.cat((torch.ones(2, 9, dtype=torch.bool), mask), 1)[:, None, None]
    assert_close(got, attend(q, *both, mask=seen))
    shorter = prefix_attend(q[1:], *pre, *(x[1:, :, 3:] for x in mine))
    assert_close(got[1:], shorter)


def test_gradients_flow_to_the_one_prefix(generator, assert_close):
    q, pre, mine, _ = group(generator, 3, 4, 2, 2, 7, 4)
    leaves = [x.requires_grad_() for x in (q, *pre, *mine)]
    weight = torch.randn(q.shape, generator=generator)
    got = torch.autograd.grad((prefix_attend(*leaves) * weight).sum(), leaves)
    both = [torch.cat((a.expand(3, -1, -1, -1), b), 2) for a, b in zip(pre, mine, strict=True)]
    assert_close(got, torch.autograd.grad((attend(q, *both) * weight).sum(), leaves))


def test_refusals(generator):
    q, pre, mine, _ = group(generator, 2, 4, 2, 1, 3, 3)
    with pytest.raises(ValueError, match="prefix_attend: k_own has shape"):
        prefix_attend(q, *pre, mine[0][:1], mine[1])
    with pytest.raises(ValueError, match="prefix_attend: k_pre has shape"):
        prefix_attend(q, pre[0][None], pre[1], *mine)
    with pytest.raises(TypeError, match="bool mask"):
        prefix_attend(q, *pre, *mine, own_mask=torch.ones(2, 3))
