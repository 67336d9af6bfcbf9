"""What is particular to each policy, by hand on small attention."""

import pytest
import torch
from kv_presets import generator, prompt, tiny

from memlens.kv.cache import prefill
from memlens.kv.policies import full, h2o, random_keep, snapkv, streaming, tova
from memlens.kv.score import column_mass, hit_rate


def qkv(length, seed=0, heads=4, kv_heads=2):
    draw = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(1, h, length, 8, generator=draw) for h in (heads, kv_heads, kv_heads)]


def run(policy, q, k, v, start=0):
    return policy.observe(policy.init(layers=1), 0, q, k, v, start)


def test_h2o_sums_every_row_and_forgets_what_it_evicts(assert_close):
    q, k, v = qkv(12)
    policy = h2o(3, 2)
    state = run(policy, q[:, :, :10], k[:, :, :10], v[:, :, :10])
    mass = column_mass(q[:, :, :10], k[:, :, :10])
    assert_close(state[0].stream.score, mass)
    idx = policy.plan(state, 0, 10)
    for head in range(2):
        best = sorted(range(8), key=lambda j: (-float(mass[0, head, j]), j))[:3]
        assert idx[0, head].tolist() == [*sorted(best), 8, 9]
    state = policy.took(state, 0, idx)
    held = torch.cat((k[:, :, :10].gather(2, idx[..., None].expand(-1, -1, -1, 8)), k[:, :, 10:11]), 2)
    state = policy.observe(state, 0, q[:, :, 10:11], held, held, 5)
    assert_close(state[0].stream.score[..., :5], mass.gather(-1, idx) + column_mass(q[:, :, 10:11], held)[..., :5])


def test_scores_of_one_forward_sum_to_the_rows(assert_close):
    q, k, v = qkv(20)
    assert_close(run(h2o(3, 2, group="sum"), q, k, v)[0].stream.score.sum(-1), torch.full((1, 2), 40.0))
    assert_close(run(h2o(3, 2), q, k, v)[0].stream.score.sum(-1), torch.full((1, 2), 20.0))


def test_h2o_in_blocks_has_the_same_state_while_nothing_goes(assert_close):
    q, k, v = qkv(20)
    for group in ("mean", "max"):
        policy = h2o(10, 10, group=group)
        state = run(policy, q[:, :, :7], k[:, :, :7], v[:, :, :7])
        state = policy.observe(state, 0, q[:, :, 7:], k, v, 7)
        assert_close(state[0].stream.score, run(policy, q, k, v)[0].stream.score)


def test_snapkv_by_hand(assert_close):
    q, k, v = qkv(20)
    k[:, :, 16] = 3 * q.unflatten(1, (2, 2)).mean(2)[:, :, -4:].mean(2)  # a hit in the window must not lift its neighbour
    policy = snapkv(9, window=4, kernel=3)
    state = run(policy, q, k, v)
    votes = column_mass(q[:, :, -4:], k)[..., :16]
    pooled = torch.stack([votes[..., max(0, j - 1) : j + 2].amax(-1) for j in range(16)], -1)
    assert_close(state[0].stream.score[..., :16], pooled)
    idx = policy.plan(state, 0, 20)
    for head in range(2):
        best = sorted(range(16), key=lambda j: (-float(pooled[0, head, j]), j))[:5]
        assert idx[0, head].tolist() == [*sorted(best), 16, 17, 18, 19]
    assert bool((hit_rate(torch.arange(20).expand(1, 2, 20), torch.rand(1, 4, 3, 20), 5) == 1).all())


def test_a_kernel_of_one_is_no_pooling(assert_close):
    q, k, v = qkv(20)
    assert_close(run(snapkv(9, window=4, kernel=1), q, k, v)[0].stream.score, column_mass(q[:, :, -4:], k))


def test_the_values_do_not_take_part_in_the_choice():
    q, k, v = qkv(20)
    for policy in (snapkv(9, window=4), h2o(4, 4), tova(6)):
        one, two = (policy.plan(run(policy, q, k, x), 0, 20) for x in (v, v.flip(2)))
        assert torch.equal(one, two)


def test_pooling_keeps_the_neighbours_of_a_hit():
    q, k, v = qkv(40)
    k[:, :, :36] *= 0.01
    k[:, :, 17] = 4 * q.unflatten(1, (2, 2))[:, :, 0, -4:].mean(2)
    chosen = snapkv(9, window=4, kernel=5).plan(run(snapkv(9, window=4, kernel=5), q, k, v), 0, 40)
    assert all({15, 16, 17, 18, 19} <= set(head.tolist()) for head in chosen[0])


def test_tova_shares_one_choice_between_heads():
    q, k, v = qkv(20)
    idx = tova(6).plan(run(tova(6), q, k, v), 0, 20)
    assert torch.equal(idx[0, 0], idx[0, 1])
    assert set(idx[0, 0].tolist()) == set(column_mass(q, k, reduce="last").mean(1)[0].topk(6).indices.tolist())


def test_streaming_and_random_keep_what_they_say():
    q, k, v = qkv(20)
    assert streaming(7, sinks=3).plan(run(streaming(7, sinks=3), q, k, v), 0, 20)[0, 0].tolist() == [
        0,
        1,
        2,
        16,
        17,
        18,
        19,
    ]
    picks = [random_keep(8, generator=generator(s), sinks=2, recent=3) for s in (1, 1, 2)]
    kept = [policy.plan(run(policy, q, k, v), 0, 20) for policy in picks]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert {0, 1, 17, 18, 19} <= set(kept[0][0, 0].tolist())


def test_full_has_no_plan():
    q, k, v = qkv(20)
    assert full().plan(run(full(), q, k, v), 0, 20) is None


def test_a_policy_that_differs_by_a_part_differs_by_a_part():
    """H2O with sinks, and SnapKV's vote with streaming's protection, are each one expression."""
    model, ids = tiny(), prompt(30)
    sinks = h2o(6, 4)._replace(first=2)
    mixed = snapkv(10, window=3)._replace(first=3)
    for policy, first in ((sinks, 2), (mixed, 3)):
        _, cache, _ = prefill(model, ids, policy)
        assert cache.held == [10] * 3
        assert all(set(range(first)) <= set(head.tolist()) for head in cache.positions(1)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: h2o(0, 0), "budget >= 1"),
        (lambda: h2o(-1, 5), "heavy >= 0"),
        (lambda: snapkv(32, window=32), "capacity >= 33"),
        (lambda: snapkv(64, window=8, kernel=4), "an odd kernel"),
        (lambda: snapkv(64, window=8, pool="mean"), "one of"),
        (lambda: snapkv(64, window=0), "window >= 1"),
        (lambda: streaming(4, sinks=4), "budget >= 5"),
        (lambda: h2o(2, 2)._replace(when="sometimes").init(layers=1), "one of"),
        (lambda: run(h2o(2, 2), *(x[:, :, :3] if i else x for i, x in enumerate(qkv(5)))), "q_start >= 0"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
