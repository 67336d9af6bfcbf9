"""Pruned channels: exact when none is dropped, as good as the formula says, and nothing wide is ever rebuilt."""

import math

import pytest
import torch
from kv_presets import PRESETS, full, prompt

from memlens.kv import storage
from memlens.kv.cache import compress, continue_with, prefill
from memlens.kv.channels import (
    ChannelPruned,
    at_channels,
    attend_pruned,
    channel_energy,
    keep_channels,
    kept_channels,
    query_energy,
    think,
    widen,
)
from memlens.kv.kivi import kivi
from memlens.kv.ksort import block_floats
from memlens.kv.mikv import mixed
from memlens.kv.think import think as thin

SHAPES = pytest.mark.parametrize(
    "old, tail, dim, heads, kv_heads", [(1, 0, 8, 2, 2), (21, 5, 10, 6, 2), (64, 32, 64, 3, 1)]
)


def tensors(generator, length, dim, heads, kv_heads, rows=3, batch=2):
    draw = [torch.randn(batch, n, t, dim, generator=generator) for n, t in ((heads, rows), (kv_heads, length))]
    draw[1] *= torch.rand(dim, generator=generator) * 3  # channels differ in size
    return *draw, torch.randn(batch, kv_heads, length, dim + 2, generator=generator)


def softmax_attention(q, k, v):
    """By torch alone."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@SHAPES
@pytest.mark.parametrize("form", ["reference", "torch"])
def test_no_channel_dropped_changes_nothing(old, tail, dim, heads, kv_heads, form, generator, assert_close):
    q, k, v = tensors(generator, old + tail, dim, heads, kv_heads)
    cp = think(k, q, 0.0, tail)
    assert cp.keep_idx.shape[-1] == dim
    out, lse = attend_pruned(q, cp, v, form=form)
    assert_close(out, softmax_attention(q, k, v))
    scores = q @ k.repeat_interleave(heads // kv_heads, 1).mT / math.sqrt(dim)
    assert_close(lse, scores.logsumexp(-1))


@SHAPES
@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("lam", [0.25, 0.4, 0.8])
def test_it_is_attention_with_the_dropped_channels_zeroed(
    old, tail, dim, heads, kv_heads, form, lam, generator, assert_close
):
    q, k, v = tensors(generator, old + tail, dim, heads, kv_heads)
    cp = think(k, q, lam, tail)
    assert cp.k_small.shape[-1] == dim - math.floor(lam * dim)
    zeroed = k.clone()
    for b in range(2):
        for h in range(kv_heads):
            dropped = sorted(set(range(dim)) - set(cp.keep_idx[b, h].tolist()))
            zeroed[b, h, :old, dropped] = 0.0
    assert_close(attend_pruned(q, cp, v, form=form).out, softmax_attention(q, zeroed, v))
    assert_close(torch.cat((widen(cp.k_small, cp.keep_idx, dim), cp.tail), 2), zeroed)


def test_the_score_is_the_norm_of_a_rank_one_term(generator, assert_close):
    """||q_i k_i^T||_F = ||q_i|| ||k_i||, and what is lost is at most the sum of the dropped ones."""
    q, k, _ = tensors(generator, 20, 8, 1, 1, rows=6, batch=1)
    score = query_energy(q, 1) * channel_energy(k)
    terms = torch.stack([torch.outer(q[0, 0, :, i], k[0, 0, :, i]) for i in range(8)])
    assert_close(score[0, 0] * 6 * 20, torch.linalg.matrix_norm(terms).square(), rtol=1e-6, atol=0.0)
    for lam in (0.25, 0.5, 0.75):
        cp = think(k, q, lam, 0)
        lost = q[0, 0] @ k[0, 0].T - at_channels(q, cp.keep_idx)[0, 0] @ cp.k_small[0, 0].T
        dropped = [i for i in range(8) if i not in cp.keep_idx]
        assert torch.linalg.matrix_norm(lost) <= torch.linalg.matrix_norm(terms)[dropped].sum() * (1 + 1e-6)
        others = [i for i in range(8) if i in cp.keep_idx]
        assert score[0, 0, dropped].max() <= score[0, 0, others].min()


def test_permuted_channels_give_permuted_choices(generator, assert_close):
    q, k, v = tensors(generator, 30, 16, 4, 2)
    order = torch.randperm(16, generator=generator)
    one, two = think(k, q, 0.4, 4), think(k[..., order], q[..., order], 0.4, 4)
    assert torch.equal(order[two.keep_idx].sort(-1).values, one.keep_idx)
    assert_close(attend_pruned(q, one, v), attend_pruned(q[..., order], two, v))


def test_ties_go_to_the_lower_channel_and_bad_shares_are_refused(generator):
    assert keep_channels(torch.ones(1, 1, 6), 4).tolist() == [[[0, 1, 2, 3]]]
    assert [kept_channels(10, lam) for lam in (0.0, 0.3, 0.35, 0.99)] == [10, 7, 7, 1]
    q, k, v = tensors(generator, 10, 8, 4, 2)
    for lam in (1.0, -0.1, 2.0):
        with pytest.raises(ValueError, match=r"lam=.*within \[0, 1\)"):
            think(k, q, lam, 2)
        with pytest.raises(ValueError, match=r"within \[0, 1\)"):
            thin(lam)
    with pytest.raises(ValueError, match="one for each key"):
        attend_pruned(q, think(k, q, 0.4, 2), v[:, :, 1:])
    with pytest.raises(ValueError, match="no multiple"):
        think(k, q[:, :3], 0.4, 2)


# --- as the storage of a cache -------------------------------------------------------------------------------------


def committed(fmt, k, v, q, idx=None):
    return fmt.commit(None, k, v, idx, query_rows=q)


@pytest.mark.parametrize("inner", [None, kivi(16, group=4, residual=4)])
def test_the_format_is_the_function(inner, generator, assert_close):
    q, k, v = tensors(generator, 40, 16, 4, 2, rows=5)
    fmt = thin(0.4, tail=8, inner=inner)
    held, cp = committed(fmt, k, v[..., :16], q), think(k, q, 0.4, 8)
    assert torch.equal(held.keep[0].long(), cp.keep_idx)
    wide = torch.cat((widen(cp.k_small, cp.keep_idx, 16), cp.tail), 2)
    assert_close(fmt.read(held, torch.float32)[0], wide)
    for form in ("reference", "torch"):
        assert_close(fmt.attend(q, held, form=form), attend_pruned(q, cp, v[..., :16]))


@pytest.mark.parametrize("values", [0.0, 0.3])
@pytest.mark.parametrize("lam", [0.0, 0.4])
def test_bytes_are_those_of_the_channels_that_are_left(lam, values, generator):
    shape = (2, 3, 50, 32)
    _, k, v = tensors(generator, 50, 32, 3, 3)
    fmt = thin(lam, tail=10, values=values)
    held = committed(fmt, k, v[..., :32], k)
    widths = [32 - math.floor(x * 32) for x in (lam, values)]
    payload = 4 * 6 * (40 * sum(widths) + 10 * 64)
    assert storage.held_bytes(fmt.parts(held))["payload"] == payload == fmt.size(shape)["payload"]
    assert sum(storage.held_bytes(fmt.parts(held)).values()) == sum(fmt.size(shape).values())
    full_bytes = sum(storage.plain().size(shape).values())
    assert sum(fmt.size(shape).values()) < full_bytes or (lam, values) == (0.0, 0.0)


def test_eviction_widens_only_what_it_must(generator, assert_close):
    """Heads lose different tokens; attention stays that of the same keys, and pruned tokens stay pruned where they can."""
    q, k, v = tensors(generator, 40, 16, 4, 2, batch=1)
    fmt = thin(0.5, tail=8)
    held = committed(fmt, k, v[..., :16], q)
    wide, values = fmt.read(held, torch.float32)
    held = fmt.commit(held, k[:, :, :3], v[:, :, :3, :16])
    wide, values = torch.cat((wide, k[:, :, :3]), 2), torch.cat((values, v[:, :, :3, :16]), 2)
    idx = torch.tensor([[[*range(0, 30, 2), 33, 34, 41, 42], [*range(12, 24), 32, 33, 34, 35, 40, 41, 42]]])
    held = fmt.commit(held, k[:, :, :0], v[:, :, :0, :16], idx)
    want = storage.take(wide, idx), storage.take(values, idx)
    assert_close(fmt.read(held, torch.float32), want)
    assert (held.small.k.shape[2], held.tail.k.shape[2]) == (12, 7)  # the second head keeps 12 old tokens, so both do
    assert_close(fmt.attend(q, held).out, softmax_attention(q, *want))
    alone = fmt.commit(held, k[:, :, :0], v[:, :, :0, :16], torch.tensor([[[17, 18], [0, 18]]]))
    assert alone.small is None
    assert_close(fmt.read(alone, torch.float32)[1], storage.take(want[1], torch.tensor([[[17, 18], [0, 18]]])))


def test_a_prompt_in_parts_is_pruned_as_a_whole(llama, assert_close):
    ids, policy = prompt(40), full().stored(thin(0.4, tail=6, rows=8))
    whole, parts = (prefill(llama, ids, policy, chunk).cache for chunk in (None, 7))
    for one, two in zip(whole.layers, parts.layers, strict=True):
        assert torch.equal(one.stored.keep[0], two.stored.keep[0])
        assert_close(
            one.store.read(one.stored, torch.float32), two.store.read(two.stored, torch.float32), rtol=1e-4, atol=1e-4
        )
    late = compress(prefill(llama, ids, keep_queries=True), policy)
    assert torch.equal(late.layers[2].stored.keep[0], whole.layers[2].stored.keep[0])
    assert_close(continue_with(llama, late, prompt(3)), continue_with(llama, whole, prompt(3)), rtol=1e-4, atol=1e-4)


def test_padding_has_no_say_in_the_choice(llama, assert_close):
    lengths = (30, 21, 11)
    rows = [prompt(n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (30 - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (30 - n) + [1] * n for n in lengths])
    policy = full().stored(thin(0.4, tail=4, rows=16))
    cache, step = prefill(llama, ids, policy, mask=mask).cache, prompt(1, rows=3)
    got = continue_with(llama, cache, step, mask=torch.nn.functional.pad(mask, (0, 1), value=1))
    for row, alone in enumerate(rows):
        single = prefill(llama, alone, policy).cache
        for one, two in zip(cache.layers, single.layers, strict=True):
            assert torch.equal(one.stored.keep[0][row], two.stored.keep[0][0])
        want = continue_with(llama, single, step[row : row + 1])
        assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "random", "elastic"])
def test_the_model_attends_to_what_the_pruned_cache_holds(name, llama, assert_close):
    """Dropping nothing is exact under every policy; dropping channels moves the logits."""
    ids = prompt(30)
    plain = prefill(llama, ids, PRESETS[name](20)).cache
    want = continue_with(llama, plain, prompt(4))
    for lam, moved in ((0.0, False), (0.6, True)):
        cache = prefill(llama, ids, PRESETS[name](20).stored(thin(lam, tail=3))).cache
        assert sum(cache.nbytes().values()) <= sum(plain.nbytes().values()) + 3 * 2 * 5 * 2
        got = continue_with(llama, cache, prompt(4))
        if moved:
            assert float((got - want).abs().max()) > 1e-3
        else:
            assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_formats_that_need_whole_heads_are_refused_inside():
    for inner in (mixed(0.2), block_floats(), thin(0.4)):
        with pytest.raises(ValueError, match="whole heads"):
            thin(0.4, inner=inner)
    with pytest.raises(ValueError, match="generator"):
        thin(0.4, by="random")
    with pytest.raises(ValueError, match="newest queries of the prompt"):
        thin(0.4, tail=2).commit(None, torch.ones(1, 1, 5, 8), torch.ones(1, 1, 5, 8))
    assert isinstance(think(torch.ones(1, 1, 5, 8), torch.ones(1, 1, 2, 8), 0.4, 2), ChannelPruned)
