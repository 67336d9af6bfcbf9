"""Fetching a part: exact when the part is all, and what is fetched is what the formulas name."""

from functools import partial

import pytest
import torch

from memlens.attention.retrieval import _tokens, chosen_chunks, shadow_append, shadow_build, shadow_decode, shadow_read
from memlens.attention.rope import frequencies, rope, unrope
from memlens.attention.sparse import sparf

SIZES = pytest.mark.parametrize("heads, kv_heads, length, dim", [(2, 2, 1, 4), (6, 2, 37, 8), (9, 3, 64, 16)])
FORMS = pytest.mark.parametrize("form", ["reference", "torch"])


def tensors(generator, heads, kv_heads, length, dim, rows=2, batch=2):
    draw = [
        torch.randn(batch, n, t, dim, generator=generator)
        for n, t in ((heads, rows), (kv_heads, length), (kv_heads, length))
    ]
    return draw[0] * 2, *draw[1:]


def sdpa(q, k, v, mask=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# --- SparF ---------------------------------------------------------------------------------------------------------


@SIZES
@FORMS
def test_all_channels_and_tokens_is_full_attention(heads, kv_heads, length, dim, form, generator, assert_close):
    q, k, v = tensors(generator, heads, kv_heads, length, dim)
    out, i, j = sparf(q, k, v, dim, length, form=form)
    assert_close(out, sdpa(q, k, v))
    assert i.shape[-1] == dim
    assert j.shape[-1] == length


@SIZES
@pytest.mark.parametrize("r, share", [(1, 0.3), (3, 0.5), (4, 1.0)])
def test_both_forms_of_sparf_agree(heads, kv_heads, length, dim, r, share, generator, assert_close):
    q, k, v = tensors(generator, heads, kv_heads, length, dim)
    q[0, 0, 0] = 0.0  # no channel stands out
    topk = max(1, round(share * length))
    want, got = (sparf(q, k, v, r, topk, form=form) for form in ("reference", "torch"))
    assert torch.equal(got.i, want.i)
    assert torch.equal(got.j, want.j)
    assert_close(got.out, want.out)


@FORMS
def test_sparf_by_hand(form, assert_close):
    """One head, three tokens, two channels; the first channel is read, and the token that it points at."""
    q, k = torch.tensor([2.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    v = torch.eye(3)
    out, i, j = sparf(q[None, None, None], k[None, None], v[None, None], 1, 1, form=form)
    guess = torch.softmax(2 * k[:, 0] / (2 * 2 / 3) ** 0.5, 0)
    assert (i.item(), j.item()) == (0, 0)
    want = guess[0] * v[0] + (1 - guess[0]) / 3
    assert_close(out[0, 0, 0], want)
    best = torch.softmax(k @ q / 2**0.5, 0).argmax()
    assert best == 1  # the estimate errs here, as it must when the other channel decides


def test_the_share_that_is_covered_lies_between_0_and_1(generator):
    q, k, _ = tensors(generator, 4, 2, 50, 16, rows=5)
    ones, zeros = torch.ones(2, 2, 50, 1), torch.zeros(2, 2, 1)
    last = torch.zeros(2, 4, 5, 1)
    for topk in (1, 5, 20, 50):
        covered = sparf(q, k, ones, 4, topk, zeros).out  # values of 1 and a mean of 0 leave the share itself
        assert bool(((covered >= last - 1e-6) & (covered <= 1 + 1e-6)).all())
        last = covered
    assert float(last.min()) > 1 - 1e-6


def test_sparf_refuses(generator):
    q, k, v = tensors(generator, 4, 2, 10, 8)
    for r, topk in ((0, 3), (9, 3), (3, 0), (3, 11)):
        with pytest.raises(ValueError, match="within"):
            sparf(q, k, v, r, topk)
    with pytest.raises(ValueError, match="no multiple"):
        sparf(q[:, :3], k, v, 3, 3)


# --- ShadowKV ------------------------------------------------------------------------------------------------------


def shadow(k, v, **plan):
    turns = {name: partial(fn, inv_freq=frequencies(k.shape[-1])) for name, fn in (("rotate", rope), ("unrotate", unrope))}
    plan = {"rank": k.shape[1] * k.shape[-1], "budget": 8, "chunk": 4, "outliers": 2, "local": 1} | plan
    return shadow_build(k, v, **turns, **plan)


@FORMS
@pytest.mark.parametrize("length", [40, 43])
def test_a_budget_of_all_chunks_is_full_attention(length, form, generator, assert_close):
    q, k, v = tensors(generator, 6, 2, length, 8)
    state = shadow(k, v, budget=400)
    assert_close(shadow_read(state), (k, v), rtol=1e-4, atol=1e-4)
    assert_close(shadow_decode(q, state, causal=False, form=form).out, sdpa(q, k, v), rtol=1e-4, atol=1e-4)
    new = torch.randn(2, 2, 2, 8, generator=generator)
    grown, rows = shadow_append(state, new, new), torch.ones(2, length + 2, dtype=torch.bool).tril(length)
    want = sdpa(q, torch.cat((k, new), 2), torch.cat((v, new), 2), rows)
    assert_close(shadow_decode(q, grown, form=form).out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank, outliers, budget", [(5, 0, 4), (16, 3, 12), (7, 2, 400)])
def test_both_forms_of_a_step_agree(rank, outliers, budget, generator, assert_close):
    q, k, v = tensors(generator, 6, 2, 45, 8)
    state = shadow(k, v, rank=rank, outliers=outliers, budget=budget)
    assert_close(*(shadow_decode(q, state, form=form) for form in ("torch", "reference")))


def test_what_a_step_sees_is_disjoint_and_complete(generator):
    q, k, v = tensors(generator, 6, 2, 46, 8)
    state = shadow(k, v, outliers=3, budget=8)
    chunks = chosen_chunks(q, state)
    local = torch.arange(40, 46).expand(2, 2, -1)  # one chunk and the remainder of two
    seen = torch.cat((_tokens(state.outliers, 4), _tokens(chunks, 4), local), -1)
    assert seen.shape[-1] == 3 * 4 + 8 + 6
    for head in seen.flatten(0, 1):
        assert head.unique().numel() == head.numel()
    assert state.local.k.shape[2] == 6
    listed = torch.cat((state.outliers, state.listed), -1).sort(-1).values
    assert torch.equal(listed, torch.arange(10, dtype=torch.int32).expand(2, 2, -1))


def test_a_step_takes_the_chunks_that_the_softmax_over_landmarks_prefers(generator):
    """Summed over rows, then the largest over the query heads: by loops."""
    q, k, v = tensors(generator, 4, 2, 44, 8, rows=3, batch=1)
    state = shadow(k, v, budget=12, outliers=2)
    got = chosen_chunks(q, state)
    for head in range(2):
        best = []
        for c, chunk in enumerate(state.listed[0, head].tolist()):
            assert torch.allclose(state.landmarks[0, head, c], k[0, head, 4 * chunk : 4 * chunk + 4].mean(0), atol=1e-6)
        for query in (2 * head, 2 * head + 1):
            rows = [torch.softmax(state.landmarks[0, head] @ q[0, query, n] / 8**0.5, 0) for n in range(3)]
            best.append(sum(rows))
        order = torch.stack(best).amax(0).argsort(descending=True)[:3]
        assert state.listed[0, head][order].sort().values.tolist() == got[0, head].tolist()


def test_shadow_refuses(generator):
    q, k, v = tensors(generator, 4, 2, 40, 8)
    with pytest.raises(ValueError, match="no multiple of chunk"):
        shadow(k, v, budget=6)
    with pytest.raises(ValueError, match="of which 9 are outliers"):
        shadow(k, v, outliers=9)
    with pytest.raises(ValueError, match="rank=99"):
        shadow(k, v, rank=99)
    with pytest.raises(ValueError, match="no multiple"):
        shadow_decode(q[:, :3], shadow(k, v))
