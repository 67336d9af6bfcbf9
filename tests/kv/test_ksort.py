"""K-sort: permuted weights and rotary tables change no product, sorting is optimal for what bounds the error."""

from itertools import permutations

import pytest
import torch
from kv_presets import prompt

from memlens.attention.exact import attend
from memlens.attention.rope import frequencies, rope
from memlens.kv.ksort import apply_channel_permutation, ksort, logit_error, rope_table, rotate
from memlens.models.hooks import attention_modules, use_attention
from memlens.quant.blockfloat import bfp


def test_the_table_is_ordinary_rope(generator, assert_close):
    x, inv = torch.randn(2, 3, 5, 8, generator=generator), frequencies(8)
    assert_close(rotate(x, torch.arange(5), rope_table(inv)), rope(x, torch.arange(5), inv))


def test_any_order_leaves_every_product_alone(generator, assert_close):
    hidden, dim, length = 12, 8, 7
    wq, wk = torch.randn(4 * dim, hidden, generator=generator), torch.randn(2 * dim, hidden, generator=generator)
    perm = torch.stack([torch.randperm(dim, generator=generator) for _ in range(2)])
    x, pos = torch.randn(1, length, hidden, generator=generator), torch.arange(length)

    def scores(wq, wk, table):
        heads = lambda w: (x @ w.T).unflatten(-1, (-1, dim)).transpose(1, 2)  # noqa: E731
        wide = table if table.freq.ndim == 1 else type(table)(*(part.repeat_interleave(2, 0) for part in table))
        q, k = rotate(heads(wq), pos, wide), rotate(heads(wk), pos, table)
        return q @ k.repeat_interleave(2, 1).mT

    table = rope_table(frequencies(dim))
    moved = apply_channel_permutation(wq, wk, perm, table)
    assert_close(scores(*moved), scores(wq, wk, table))
    back = apply_channel_permutation(moved[0], moved[1], perm.argsort(-1), table)
    assert torch.equal(back[0], wq)
    assert torch.equal(back[1], wk)


def test_a_permuted_model_gives_the_same_logits(llama, assert_close):
    """Queries and keys are made anew from permuted weights, in every layer."""
    ids, order, modules = prompt(20), ksort(llama), attention_modules(llama)
    table, inputs = rope_table(frequencies(8)), {}
    hooks = [m.q_proj.register_forward_hook(lambda _, x, y, i=i: inputs.__setitem__(i, x[0])) for i, m in modules.items()]

    def sorted_attention(layer, q, k, v, offset):
        module, perm = modules[layer], order[layer]
        wq, wk, moved = apply_channel_permutation(module.q_proj.weight, module.k_proj.weight, perm, table)
        heads = lambda w: (inputs[layer] @ w.T).unflatten(-1, (-1, 8)).transpose(1, 2)  # noqa: E731
        pos, wide = torch.arange(20), type(moved)(*(part.repeat_interleave(2, 0) for part in moved))
        new_q, new_k = rotate(heads(wq), pos, wide), rotate(heads(wk), pos, moved)
        assert float((new_k - k).abs().max()) > 0.1  # the channels did move
        return attend(new_q, new_k, v)

    with torch.no_grad():
        want = llama(ids).logits
        with use_attention(llama, sorted_attention):
            got = llama(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_order_is_by_norm_per_head():
    weight = torch.diag(torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 6.0]))
    assert ksort([weight], kv_heads=2).tolist() == [[[1, 2, 0], [2, 0, 1]]]


def test_sorting_minimises_what_bounds_the_error(generator):
    """Over all orders of six channels in blocks of two, the sum of the blocks' squared maxima is least when sorted."""

    def cost(size, order):
        return float(size[list(order)].view(3, 2).amax(-1).square().sum())

    for _ in range(20):
        size = torch.rand(6, generator=generator)
        best = min(cost(size, order) for order in permutations(range(6)))
        assert cost(size, size.argsort(descending=True).tolist()) == pytest.approx(best)


def test_sorted_blocks_lose_less_when_channels_differ(generator):
    k = torch.randn(1, 2, 50, 16, generator=generator) * torch.logspace(-2, 1, 16)[torch.randperm(16, generator=generator)]
    q = torch.randn(1, 4, 9, 16, generator=generator) / k.std(dim=(0, 1, 2))
    order = k.square().mean((0, 1, 2)).argsort(descending=True)
    mixed, in_order = bfp(k, 4, 4), bfp(k[..., order], 4, 4)[..., order.argsort()]
    assert logit_error(q, k, in_order) < 0.5 * logit_error(q, k, mixed)
    assert logit_error(q, k, k) == 0.0


def test_bad_orders_are_refused():
    weight, table = torch.zeros(8, 3), rope_table(frequencies(4))
    with pytest.raises(ValueError, match="each channel once"):
        apply_channel_permutation(weight, weight, torch.tensor([[0, 1, 2, 2], [0, 1, 2, 3]]), table)
    with pytest.raises(ValueError, match="rows_of_wk=6"):
        apply_channel_permutation(weight, weight[:6], torch.arange(4).expand(2, 4), table)
    with pytest.raises(ValueError, match="kv_heads"):
        ksort([weight])
