"""Locret: the score by hand, its independence of what comes later, the eviction of a chunked prefill, and what training learns."""

import pytest
import torch
from kv_presets import generator, prompt, retaining, tiny

from memlens.kv.cache import PolicyCache, continue_with, prefill
from memlens.kv.locret import (
    Examples,
    chunked_prefill,
    examples,
    fit_head,
    locret,
    retaining_loss,
    retaining_scores,
    train_retaining_heads,
)
from memlens.models.hooks import capture_qkv

HEADS = retaining(8)


def qkv(length, rows=1):
    draw = generator(4)
    return [torch.randn(rows, heads, length, 8, generator=draw) for heads in (4, 2, 2)]


def test_the_score_by_hand(assert_close):
    q, k, v = qkv(5, rows=2)
    w1, w2 = HEADS.layers[0]
    got = retaining_scores(q, k, v, w1, w2)
    for row in range(2):
        for t in range(5):
            x = torch.cat([part[row, head, t] for part in (q, k, v) for head in range(part.shape[1])])
            hidden = w1 @ x
            assert_close(got[row, :, t], w2 @ (hidden * hidden.sigmoid()))


def test_the_model_is_read_before_rotary_positions(llama, assert_close):
    ids = prompt(21, rows=2)
    raw = capture_qkv(llama, ids, pre_rope=True)
    cache = prefill(llama, ids, locret(HEADS, 30)).cache
    for layer in range(3):
        assert_close(cache.state[layer].stream.score, retaining_scores(*raw[layer], *HEADS.layers[layer]))


def test_a_score_does_not_depend_on_later_tokens(llama, assert_close):
    ids = prompt(30)
    long = prefill(llama, ids, locret(HEADS, 40)).cache
    for options in ({}, {"chunk": 7}):
        short = prefill(llama, ids[:, :19], locret(HEADS, 40), **options).cache
        for layer in range(3):
            assert_close(short.state[layer].stream.score, long.state[layer].stream.score[..., :19])
    first = prefill(llama, ids[:, :19], locret(HEADS, 9)).cache
    before = first.state[0].stream
    continue_with(llama, first, ids[:, 19:20])
    after = dict(zip(first.state[0].stream.pos[0, 0].tolist(), first.state[0].stream.score[0, 0].tolist(), strict=True))
    assert all(
        after[p] == s for p, s in zip(before.pos[0, 0].tolist(), before.score[0, 0].tolist(), strict=True) if p in after
    )


def test_a_budget_for_all_is_a_plain_chunked_prefill(llama, assert_close):
    ids = prompt(30)
    got = chunked_prefill(llama, ids, HEADS, budget=30, chunk=8, stabilizers=4, local=3)
    want = prefill(llama, ids, chunk=8)
    assert_close(got.logits, want.logits)
    assert_close(continue_with(llama, got.cache, prompt(4)), continue_with(llama, want.cache, prompt(4)))


@pytest.mark.parametrize("local", [0, 3, 6])
def test_no_more_is_held_than_budget_and_chunk(local, llama):
    ids = prompt(40)
    cache = chunked_prefill(llama, ids, HEADS, budget=11, chunk=6, stabilizers=4, local=local).cache
    assert {layer.most for layer in cache.layers} == {11 + 6}
    assert cache.held == [11 + local] * 3
    assert set(range(40 - local, 40)) <= set(cache.positions(1)[0, 0].tolist())
    continue_with(llama, cache, prompt(1))
    assert cache.held == [12 + local] * 3


def test_stabilizers_stay_in_every_chunk_but_the_last(llama):
    ids, budget, many = prompt(30), 9, 5
    cache, lost = PolicyCache(llama.config, locret(HEADS, budget, stabilizers=many, until=30)), 0
    whole = prefill(llama, ids, locret(HEADS, 40)).cache
    for stop in range(10, 31, 10):
        before = [cache.positions(i) if stop > 10 else torch.empty(1, 2, 0) for i in range(3)]
        continue_with(llama, cache, ids[:, stop - 10 : stop])
        for layer in range(3):
            for head, kept in enumerate(cache.positions(layer)[0].tolist()):
                newest = set(range(stop - many, stop))
                if stop < 30:
                    assert newest <= set(kept)
                elif layer == 0:  # its scores are those of a full forward; deeper ones read what was lost above
                    lost += len(newest - set(kept))
                    score = whole.state[0].stream.score[0, head]
                    pool = [*map(int, before[0][0, head].tolist()), *range(20, 30)]
                    assert kept == sorted(sorted(pool, key=lambda p: (-float(score[p]), p))[:budget])
    assert lost > 0
    assert all(entry.done for entry in cache.state)


def test_every_forward_evicts_where_no_end_is_given(llama):
    cache = prefill(llama, prompt(30), locret(HEADS, 9, stabilizers=3), chunk=4).cache
    for _ in range(3):
        continue_with(llama, cache, prompt(1))
        assert cache.held == [9] * 3


def test_the_label_is_the_largest_logit_of_a_later_row(llama, assert_close):
    ids = prompt(14, rows=2)
    found, raw = examples(llama, ids, 9), capture_qkv(llama, ids)
    for layer in range(3):
        q, k, v = raw[layer]
        score = torch.einsum("bhid,bhjd->bhij", q[:, :, 9:], k[:, :, :9].repeat_interleave(2, 1)) / 8**0.5
        assert_close(found[layer].label, score.amax(2).unflatten(1, (2, 2)).amax(2))
        assert_close(found[layer].v, v[:, :, :9])
    for got, want in zip(found[1][:2], capture_qkv(llama, ids, pre_rope=True)[1][:2], strict=True):
        assert_close(got, want[:, :, :9])


def test_the_model_runs_no_further_than_it_must(llama):
    ran = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(llama.model.layers)]
    before = llama.config._attn_implementation
    assert list(examples(llama, prompt(10), 6, [1])) == [1]
    for hook in hooks:
        hook.remove()
    assert ran == [0]  # the second layer stopped inside its attention
    assert llama.config._attn_implementation == before


def made(count, seed):
    """Examples whose label can be read off the token: one channel of its key."""
    draw, found = generator(seed), []
    for _ in range(count):
        q, k, v = (torch.randn(1, heads, 40, 8, generator=draw) for heads in (4, 2, 2))
        found.append(Examples(q, k, v, 2 * k[..., 3]))
    return found


def test_training_learns_what_can_be_known():
    options = {"hidden": 32, "epochs": 12, "lr": 1e-2}
    head = fit_head(made(20, 1), generator=generator(), **options)
    *given, label = made(1, 2)[0]
    got = retaining_scores(*given, *head)
    assert float(torch.corrcoef(torch.stack((got[0, 0], label[0, 0])))[0, 1]) > 0.95
    again = fit_head(made(20, 1), generator=generator(), **options)
    assert torch.equal(head.w1, again.w1)
    assert not head.w1.requires_grad


def test_the_loss_by_hand():
    score, label = torch.tensor([[[0.0, 3.0, 1.0]]]), torch.tensor([[[0.5, 0.0, 1.0]]])
    smooth_l1 = (0.5 * 0.25 + 2.5 + 0.0) / 3
    assert float(retaining_loss(score, label)) == pytest.approx(smooth_l1 + 0.0025 * (9 + 4) / 2)
    assert float(retaining_loss(score, label, smooth=0.0)) == pytest.approx(smooth_l1)
    assert float(retaining_loss(score[..., :1], label[..., :1])) == pytest.approx(0.125)


def test_trained_heads_go_into_the_policy_and_leave_the_model_alone(llama):
    before = {name: w.clone() for name, w in llama.named_parameters()}
    windows = [prompt(16, seed=s) for s in range(3)]
    heads = train_retaining_heads(llama, windows, prompt=12, hidden=8, generator=generator())
    assert {name: head.w2.shape for name, head in heads.layers.items()} == dict.fromkeys(range(3), (2, 8))
    assert chunked_prefill(llama, prompt(20), heads, budget=8, chunk=4, stabilizers=2, local=2).cache.held == [10] * 3
    assert all(torch.equal(w, before[name]) and w.grad is None for name, w in llama.named_parameters())
    few = train_retaining_heads(llama, windows, prompt=12, layers=[2, 0], hidden=8, generator=generator())
    assert sorted(few.layers) == [0, 2]
    with pytest.raises(ValueError, match="layer 1 without a head"):
        prefill(llama, prompt(20), locret(few, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: locret(HEADS, 4, stabilizers=5), "stabilizers"),
        (lambda m: locret(HEADS, 0), "budget >= 1"),
        (lambda m: locret(HEADS, 4, until=0), "until >= 1"),
        (lambda m: chunked_prefill(m, prompt(9), HEADS, budget=4, chunk=0, local=0), "chunk >= 1"),
        (lambda m: chunked_prefill(m, prompt(9), HEADS, budget=4, chunk=4, stabilizers=2, local=5), "local"),
        (lambda m: chunked_prefill(m, prompt(3), HEADS, budget=4, chunk=4, stabilizers=2, local=3), "before_local"),
        (lambda m: retaining_scores(*qkv(5), HEADS.layers[0].w1[:, :-1], HEADS.layers[0].w2), "w1 for 63 inputs"),
        (lambda m: examples(m, prompt(9), 9), "prompt"),
        (lambda m: examples(m, prompt(9), 4, [5]), "one of"),
        (lambda m: train_retaining_heads(m, [], prompt=4, generator=generator()), "windows >= 1"),
        (lambda m: fit_head(made(1, 0), hidden=4, lr=0.0, generator=generator()), "lr"),
        (lambda m: fit_head(made(1, 0), hidden=4, warmup=1.5, generator=generator()), "warmup"),
        (lambda m: retaining_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)), "length"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny())
