"""Scissorhands, Keyformer and SirLLM: what is particular to each score, by hand and in the limit."""

from itertools import pairwise

import pytest
import torch
from kv_presets import generator, prompt, tiny

from memlens.kv.cache import PolicyCache, continue_with, prefill, stream_eval
from memlens.kv.kivi import kivi
from memlens.kv.policies import h2o, keyformer, scissorhands, sirllm
from memlens.kv.score import column_mass, gumbel_mass, persistence_ratio, surprisal


def qkv(length, seed=0, rows=1):
    draw = generator(seed)
    return [2 * torch.randn(rows, h, length, 8, generator=draw) for h in (4, 2, 2)]


def softmax(q, k, noise=None, tau=1.0):
    """All of softmax((s + noise) / tau), causal: what the sums are held to."""
    score = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) / 8**0.5
    score = (score if noise is None else score + noise) / tau
    return score.masked_fill(torch.ones(score.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def scored(policy, q, k, v, blocks=(0,)):
    state, stops = policy.init(layers=1), (*blocks[1:], q.shape[2])
    for start, stop in zip(blocks, stops, strict=True):
        state = policy.observe(state, 0, q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], start)
    return state


# --- gumbel_mass and Keyformer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
def test_gumbel_mass_is_the_softmax_written_out(form, group, assert_close):
    q, k, _ = qkv(21, rows=2)
    noise, tau = torch.randn(2, 4, 21, 21, generator=generator(3)), torch.linspace(0.5, 2, 21)
    sums = softmax(q, k, noise, tau[:, None]).sum(2).unflatten(1, (2, 2))
    want = {"mean": sums.mean(2), "sum": sums.sum(2), "max": sums.amax(2)}[group]
    assert_close(gumbel_mass(q, k, tau=tau, noise=noise, group=group, form=form), want)


def test_zero_noise_at_temperature_one_is_h2o_bit_for_bit():
    q, k, v = qkv(300)
    assert torch.equal(gumbel_mass(q, k, tau=1, noise=torch.zeros(1, 4, 300, 300)), column_mass(q, k, form="torch"))
    quiet = keyformer(20, generator=generator(), recent=0.5, tau_delta=0.0, noise=0.0)
    for blocks in ((0,), (0, 7, 290)):
        ours, theirs = (scored(policy, q, k, v, blocks)[0].stream.score for policy in (quiet, h2o(10, 10)))
        assert torch.equal(ours, theirs)
    assert torch.equal(quiet.plan(scored(quiet, q, k, v), 0, 300), h2o(10, 10).plan(scored(h2o(10, 10), q, k, v), 0, 300))
    loud = keyformer(20, generator=generator(), recent=0.5, tau_delta=0.0)
    assert not torch.equal(scored(loud, q, k, v)[0].stream.score, theirs)


def test_a_cold_noisy_softmax_is_a_draw_from_the_plain_one(assert_close):
    """Gumbel-max: at tau -> 0 the mean over draws is P; at tau = 1 it is flatter."""
    q, k, _ = qkv(8)
    many, draw = 4000, generator(5)
    noise = -(-torch.rand(many, 4, 8, 8, generator=draw).clamp(min=1e-12).log()).log()
    q, k = (x.expand(many, -1, -1, -1) for x in (q, k))
    want = softmax(q[:1], k[:1]).sum(2).unflatten(1, (2, 2)).mean(2)
    cold, warm = (gumbel_mass(q, k, tau=tau, noise=noise).mean(0, keepdim=True) for tau in (1e-3, 1.0))
    assert_close(cold, want, rtol=0, atol=0.05)
    assert float((warm - want).abs().max()) > 0.1
    uniform = torch.ones(8, 8).tril().div(torch.arange(1, 9)[:, None]).sum(0)
    assert float((warm - uniform).abs().sum()) < float((want - uniform).abs().sum())


def test_an_infinite_temperature_is_uniform(assert_close):
    q, k, _ = qkv(12)
    noise = torch.randn(1, 4, 12, 12, generator=generator())
    uniform = torch.ones(12, 12).tril().div(torch.arange(1, 13)[:, None]).sum(0)
    assert_close(gumbel_mass(q, k, tau=1e8, noise=noise), uniform.expand(1, 2, 12))


def test_the_temperature_rises_by_one_step_for_each_row_after_the_prompt(assert_close):
    q, k, v = qkv(14)
    policy = keyformer(14, generator=generator(), noise=0.0, tau_init=0.5, tau_delta=0.25)
    tau = torch.tensor([0.5] * 9 + [0.75, 1.0, 1.25, 1.5, 1.75])
    want = softmax(q, k, tau=tau[:, None]).sum(2).unflatten(1, (2, 2)).mean(2)
    for blocks in ((0, 9), (0, 9, 10, 12)):
        assert_close(scored(policy, q, k, v, blocks)[0].stream.score, want)


def test_noise_is_fresh_for_rows_and_heads_and_repeats_with_its_seed():
    q, k, v = (torch.zeros_like(x) for x in qkv(40))
    one, two, other = (scored(keyformer(9, generator=generator(s)), q, k, v)[0].stream.score for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:, 0], one[:, 1])
    assert float(one[0, 0, 0]) < 40  # one draw for all rows would give all of them to one key
    torch.testing.assert_close(one.sum(-1), torch.full((1, 2), 40.0))


# --- Scissorhands --------------------------------------------------------------------------------------------------


def record(q, k, window):
    """For each key, how many of the last `window` rows that see it gave it less than 1/t, mean over a group."""
    p, length = softmax(q, k), q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    below = seen & (p < (1 - 1e-5) / torch.arange(1, length + 1)[:, None])
    return below[:, :, -window:].sum(2).unflatten(1, (2, 2)).sum(2)


@pytest.mark.parametrize("blocks", [(0,), (0, 5), (0, 1, 2, 11, 30)])
@pytest.mark.parametrize("window", [1, 6, 16, 40])
def test_the_rank_is_that_of_the_record_with_the_older_first_among_equals(window, blocks):
    q, k, v = qkv(40)
    policy = scissorhands(30, window=window, recent=0)
    score, counts = scored(policy, q, k, v, blocks)[0].stream.score, record(q, k, window if window <= 16 else 40)
    for head in range(2):
        order = sorted(range(40), key=lambda j: (-int(counts[0, head, j]), j))
        assert score[0, head].argsort().tolist() == order


def test_a_long_window_leaves_a_sixteenth_at_a_time():
    q, k, v = qkv(100)
    ring = scored(scissorhands(60, window=64), q, k, v, (0, 50, 51, 77))[0].stream.aux["below"]
    assert ring.shape == (1, 2, 16, 100)
    assert torch.equal(ring.sum(-2).long(), record(q, k, 64))  # 100 rows end a slot of 4
    later = scored(scissorhands(60, window=64), *(x[:, :, :98] for x in (q, k, v)), (0, 50))[0].stream.aux["below"]
    assert torch.equal(later.sum(-2).long(), record(q[:, :, :98], k[:, :, :98], 62))


def test_compression_is_rare_and_large():
    model, budget, many = tiny(), 12, 6
    cache, sizes = PolicyCache(model.config, scissorhands(budget, window=9, recent=3, drop=0.5)), []
    for i in range(40):
        continue_with(model, cache, prompt(1, seed=i))
        sizes.append(cache.held[0])
        assert all(set(range(max(0, i - 2), i + 1)) <= set(head.tolist()) for head in cache.positions(1)[0])
    assert sizes[:12] == list(range(1, 13))
    assert set(sizes[12:]) == set(range(budget - many + 1, budget + 1))
    assert sum(b < a for a, b in pairwise(sizes)) == 5  # at 13, 19, 25, 31, 37
    assert prefill(model, prompt(40), scissorhands(budget, recent=3)).cache.held == [budget - many + 1] * 3


def test_with_one_row_to_look_at_the_dropped_token_is_below_uniform():
    for seed in range(20):
        q, k, v = qkv(15, seed)
        policy = scissorhands(14, window=1, recent=0, drop=0.0)
        idx, p = policy.plan(scored(policy, q, k, v), 0, 15), softmax(q, k)[0, :, -1].unflatten(0, (2, 2))
        for head in range(2):
            (gone,) = set(range(15)) - set(idx[0, head].tolist())
            assert int((p[head, :, gone] < 1 / 15).sum()) == int((p[head] < 1 / 15).sum(0).max())


def test_scissorhands_with_four_bit_storage_multiplies_the_savings():
    model, ids = tiny(), prompt(60)
    arms = ((61, 16), (24, 4))  # tokens, bits
    policies = [scissorhands(n, recent=4, drop=0.0).stored(kivi(bits, group=8, residual=8)) for n, bits in arms]
    full, small = (prefill(model, ids, policy).cache for policy in policies)
    assert small.held == [24] * 3
    sizes = [sum(c.nbytes().get(x, 0) for x in ("payload", "scales", "residual")) for c in (full, small)]
    assert sizes[1] < 0.4 * sizes[0]


def test_persistence_by_hand():
    p = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.1, 0.8, 0.1, 0], [0.7, 0.1, 0.1, 0.1]]).view(1, 1, 4, 4)
    got = persistence_ratio(p, 2)  # early: key 0 (0.9 > 1/2); late: keys 1 (0.8 > 1/3) and 0 (0.7 > 1/4)
    assert (float(got.ratio), float(got.chance)) == (0.5, 0.5)
    assert float(persistence_ratio(p, 2, "2.5/t").ratio) == 0.0  # only 0.7 > 2.5 / 4 is late, nothing is early
    assert float(persistence_ratio(p, 2, 0.85).chance.nan_to_num(-1)) == -1  # no late key: nothing can persist
    assert float(persistence_ratio(p, 2, 0.75).ratio) == 0.0


def test_persistence_of_identical_halves_is_one():
    half = softmax(*qkv(10)[:2])
    p = torch.zeros(1, 4, 20, 20)
    p[:, :, :10, :10] = half
    p[:, :, 10:, :10] = half
    for threshold in (0.3, 0.1):
        assert bool((persistence_ratio(p, 10, threshold).ratio == 1).all())
    assert bool((persistence_ratio(p, 10, 0.3).chance < 1).any())


# --- SirLLM --------------------------------------------------------------------------------------------------------


def test_scores_are_the_teacher_forced_nll_of_one_forward(model, assert_close):
    ids = prompt(20, rows=2)
    with torch.no_grad():
        want = surprisal(model(ids).logits, ids)
    for chunk in (None, 1, 6):
        cache = prefill(model, ids, sirllm(start=2, entropy=30), chunk).cache
        for layer in range(3):
            assert_close(cache.state[layer].stream.score, want[:, None].expand(-1, 2, -1))


def test_all_layers_and_heads_hold_the_same_positions(llama):
    cache = prefill(llama, prompt(30), sirllm(start=2, entropy=5, recent=3), chunk=4).cache
    for layer in range(3):
        for head in range(2):
            assert torch.equal(cache.positions(layer)[0, head], cache.positions(0)[0, 0])
    assert {0, 1, 27, 28, 29} <= set(cache.positions(0)[0, 0].tolist())


def test_the_most_surprising_tokens_stay(llama):
    ids = prompt(30)
    with torch.no_grad():
        nll = surprisal(llama(ids).logits, ids)[0, 2:27]
    cache = prefill(llama, ids, sirllm(start=2, entropy=5, recent=3)).cache
    assert cache.positions(0)[0, 0, 2:7].tolist() == sorted((nll.topk(5).indices + 2).tolist())


def test_decay_applied_t_times_is_eta_to_the_t(llama, assert_close):
    ids = prompt(40)
    whole = prefill(llama, ids[:, :20], sirllm(start=4, entropy=16), None).cache
    first = dict(zip(whole.positions(0)[0, 0].tolist(), whole.state[0].stream.score[0, 0].tolist(), strict=True))
    cache = prefill(llama, ids[:, :20], sirllm(start=4, entropy=6, decay=0.8)).cache
    for step in range(5):
        continue_with(llama, cache, ids[:, 20 + step : 21 + step])
        stream = cache.state[0].stream
        for pos, score in zip(stream.pos[0, 0].tolist(), stream.score[0, 0].tolist(), strict=True):
            if 0 < pos < 20:
                assert score == pytest.approx(first[pos] * 0.8 ** (step + 1), rel=1e-4)


def test_the_caller_gets_the_logits_that_were_asked_for(llama, assert_close):
    ids = prompt(12)
    for policy in (sirllm(start=2, entropy=30), h2o(16, 16)):
        logits, cache, _ = prefill(llama, ids, policy)
        more = continue_with(llama, cache, prompt(5), keep=2)
        assert (logits.shape, more.shape) == ((1, 61), (1, 2, 61))
        if policy.hears:
            kept = logits, more
    assert_close(kept[0], logits)
    assert_close(kept[1], more)
    assert not {**llama._forward_hooks, **llama._forward_pre_hooks}
    assert stream_eval(llama, ids, sirllm(start=2, entropy=4), chunk=5, start=7).shape == (1, 5, 61)


def test_forks_and_repeated_rows_carry_what_was_heard(llama, assert_close):
    cache = prefill(llama, prompt(20), sirllm(start=2, entropy=8)).cache
    twin = cache.fork()
    twin.batch_repeat_interleave(3)
    rows = continue_with(llama, twin, prompt(4).expand(3, -1))
    assert_close(rows, continue_with(llama, cache, prompt(4)).expand(3, -1, -1))
    assert_close(twin.state[2].stream.score, cache.state[2].stream.score.expand(3, -1, -1))
    cache.reset()
    assert cache.last_logits is None


def test_tokens_that_cannot_be_heard_are_refused(llama):
    cache = PolicyCache(llama.config, sirllm(start=2, entropy=8))
    with cache.on(llama), pytest.raises(RuntimeError, match="input_ids"):
        llama(inputs_embeds=torch.zeros(1, 3, 32), past_key_values=cache)
    assert cache.held == [0] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scissorhands(20, recent=10), "recent=10 must survive"),
        (lambda: scissorhands(20, window=0), "window"),
        (lambda: scissorhands(20, drop=1.0), "drop"),
        (lambda: keyformer(0, generator=generator()), "budget >= 1"),
        (lambda: keyformer(9, generator=generator(), tau_init=0.0), "tau_init > 0"),
        (lambda: keyformer(9, generator=generator(), recent=1.5), "recent"),
        (lambda: keyformer(9, generator=generator(), group="max"), "one of"),
        (lambda: gumbel_mass(*qkv(5)[:2], tau=0.0, noise=None), "tau > 0"),
        (lambda: gumbel_mass(*qkv(5)[:2], tau=1.0, noise=torch.zeros(1, 4, 5, 4)), "one draw for each"),
        (lambda: sirllm(decay=0.0), "decay"),
        (lambda: sirllm(decay=1.1), "decay"),
        (lambda: sirllm(start=4, entropy=4, recent=4)._replace(budget=7).init(layers=1), "count inside the budget"),
        (lambda: sirllm(start=-1), "start >= 0"),
        (lambda: persistence_ratio(torch.rand(1, 1, 4, 4), 4), "within"),
        (lambda: persistence_ratio(torch.rand(1, 1, 4, 4), 2, "t/2"), "a number or"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
