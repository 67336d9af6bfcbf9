"""Merging: assignments by hand, what weights promise, and a merging cache against dense attention over merged keys and values."""

import math

import pytest
import torch
from kv_presets import MERGING, PRESETS, exactly, generator, prompt
from torch.nn.functional import cosine_similarity

from memlens.attention.exact import attend
from memlens.attention.rope import rope, unrope
from memlens.kv.cache import PolicyCache, compress, continue_with, prefill
from memlens.kv.d2o import d2o, layer_density, resembling
from memlens.kv.elastic import Shield, averaged, elastic
from memlens.kv.merge import Match, Sides, log_counts, merge_into, merge_kv, nearest_by_cosine, nearest_by_position
from memlens.kv.select import complement, fixed_point
from memlens.models.hooks import use_attention

LENGTH, BUDGET, STEPS = 23, 9, 5
SHAPES = pytest.mark.parametrize(("evicted", "kept", "dim"), [(1, 1, 8), (7, 3, 24), (130, 63, 16)])


def sides(evicted, kept, dim=8, draw=None):
    draw = draw or generator()
    keep, gone = torch.randn(1, 2, kept, dim, generator=draw), torch.randn(1, 2, evicted, dim, generator=draw)
    place = torch.randperm(evicted + kept, generator=draw)
    pos_keep, pos_evict = place[:kept].sort().values, place[kept:].sort().values
    score = torch.rand(1, 2, kept, generator=draw)
    return Sides(keep, gone, pos_keep.expand(1, 2, -1), pos_evict.expand(1, 2, -1), score, None)


# --- assignments ---------------------------------------------------------------------------------------------------


@SHAPES
def test_the_nearest_by_cosine_is_torchs(evicted, kept, dim, assert_close):
    x = sides(evicted, kept, dim)
    want = cosine_similarity(x.k_evict[:, :, :, None], x.k_keep[:, :, None], dim=-1)
    for form in ("reference", "torch"):
        assign, sim = nearest_by_cosine(x.k_evict, x.k_keep, form=form)
        assert torch.equal(assign, want.argmax(-1))
        assert_close(sim, want.amax(-1))


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_ties_and_keys_without_a_direction(form):
    keep = torch.tensor([[[[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, -1.0]]]])
    gone = torch.tensor([[[[3.0, 0.0], [0.0, 0.0], [0.0, 5.0]]]])
    assign, sim = nearest_by_cosine(gone, keep, form=form)
    assert assign[0, 0].tolist()[:2] == [1, 0]  # the lower of two with cosine 1
    assert sim[0, 0].tolist() == [1.0, -1.0, 0.0]
    with pytest.raises(ValueError, match="finite"):
        nearest_by_cosine(gone.masked_fill(gone == 5, torch.nan), keep, form=form)
    with pytest.raises(ValueError, match="nothing to merge into"):
        nearest_by_cosine(gone, keep[:, :, :0], form=form)


@SHAPES
def test_the_nearest_by_position_is_the_nearest(evicted, kept, dim):
    x = sides(evicted, kept, dim)
    may = torch.rand(1, 2, kept, generator=generator(5)) < 0.6
    for allowed in (torch.ones_like(may), may):
        far = (x.pos_evict[..., None] - x.pos_keep[..., None, :]).abs().masked_fill(~allowed[:, :, None], 10**6)
        got = nearest_by_position(x.pos_evict, x.pos_keep, open=allowed)
        some = allowed.any(-1, keepdim=True)
        assert torch.equal(got.masked_fill(~some, 0), far.argmin(-1).masked_fill(~some, 0))
    assert nearest_by_position(torch.tensor([4]), torch.tensor([2, 6])).tolist() == [0]  # a tie: the lower
    with pytest.raises(ValueError, match="ascending"):
        nearest_by_position(torch.tensor([4]), torch.tensor([6, 2]))


# --- weights -------------------------------------------------------------------------------------------------------


def rules():
    return {
        "d2o": lambda x: resembling(x, None, beta=0.7), "all": lambda x: resembling(x, None, beta=0.7, threshold=-0.99),
        "elastic": lambda x: averaged(x, None), "guarded": lambda x: averaged(x, None, reach=2, shield=Shield(1, 1, 2)),
    }  # fmt: skip


@pytest.mark.parametrize("name", rules())
@SHAPES
def test_the_weights_of_a_kept_token_sum_to_one(name, evicted, kept, dim, assert_close):
    match = rules()[name](sides(evicted, kept, dim))
    total = match.w_self.scatter_add(-1, match.assign, match.w_evict)
    assert_close(total, torch.ones_like(total))
    assert bool((match.w_self > 0).all() & (match.w_evict >= 0).all())
    if name in ("all", "elastic"):
        assert bool((match.w_evict > 0).all())


@pytest.mark.parametrize("name", ["all", "elastic"])
def test_merging_equal_tokens_changes_nothing(name, assert_close):
    x = sides(12, 4)
    match = rules()[name](x)
    x = x._replace(k_evict=x.k_keep.gather(2, match.assign[..., None].expand(-1, -1, -1, 8)))
    assert_close(merge_into(x.k_keep, x.k_evict, match.assign, match.w_evict, match.w_self), x.k_keep)


def test_a_bucket_is_the_arithmetic_mean(assert_close):
    x = sides(40, 6)
    match = averaged(x, None)
    got = merge_into(x.k_keep, x.k_evict, match.assign, match.w_evict, match.w_self)
    for head in range(2):
        for c in range(6):
            bucket = torch.cat((x.k_keep[0, head, c : c + 1], x.k_evict[0, head][match.assign[0, head] == c]))
            assert_close(got[0, head, c], bucket.mean(0))


def test_d2o_by_hand(assert_close):
    x = sides(9, 4)
    match = resembling(x, torch.full((1, 2), 0.3), beta=0.7)
    u = cosine_similarity(x.k_evict[:, :, :, None], x.k_keep[:, :, None], dim=-1).amax(-1)
    tau = 0.7 * u.mean(-1) + 0.3 * 0.3
    assert_close(match.memory, tau)
    for head in range(2):
        for c in range(4):
            mine = [i for i in range(9) if match.assign[0, head, i] == c and u[0, head, i] >= tau[0, head]]
            z = math.e + sum(math.exp(u[0, head, i]) for i in mine)
            for i in mine:
                assert float(match.w_evict[0, head, i]) == pytest.approx(math.exp(u[0, head, i]) / z, rel=1e-5)
    assert_close(resembling(x, None, beta=0.7).memory, u.mean(-1))
    assert int((match.w_evict > 0).sum()) == int((u >= tau[..., None]).sum())


def test_reach_and_shield_leave_tokens_out():
    x = sides(40, 12)
    match = averaged(x, None, reach=2, shield=Shield(1, 2, 3))
    heavy = x.score.topk(3, -1).indices
    shut = torch.zeros(1, 2, 12, dtype=torch.bool).scatter_(-1, heavy, True)
    shut[..., 0] = shut[..., -2:] = True
    assert not bool((match.w_evict > 0)[shut.gather(-1, match.assign)].any())
    assert bool((match.w_self[shut] == 1).all())
    far = (x.pos_keep.gather(-1, match.assign) - x.pos_evict).abs()
    assert not bool((match.w_evict > 0)[far > 2].any())
    assert bool((match.w_evict > 0).any())


def test_merge_kv_turns_keys_where_it_is_asked_to(assert_close):
    draw, inv_freq = generator(3), torch.tensor([1.0, 0.3, 0.1, 0.01])
    raw, v = torch.randn(1, 2, 12, 8, generator=draw), torch.randn(1, 2, 12, 8, generator=draw)
    pos = torch.arange(5, 17).expand(1, 2, -1)
    k, idx = rope(raw, pos, inv_freq), torch.tensor([1, 5, 10]).expand(1, 2, -1)
    gone = complement(idx, 12)
    match = averaged(Sides(k, k, pos.gather(-1, idx), pos.gather(-1, gone), torch.rand(1, 2, 3), None), None)

    def take(x, at):
        return x.gather(2, at[..., None].expand(-1, -1, -1, 8))

    def mean(x):
        return merge_into(take(x, idx), take(x, gone), match.assign, match.w_evict, match.w_self)

    same, values = merge_kv(k, v, idx, match, keys="none")
    assert torch.equal(same, take(k, idx))
    assert_close(values, mean(v))
    assert_close(merge_kv(k, v, idx, match)[0], mean(k))
    turned, _ = merge_kv(k, v, idx, match, keys="pre_rope", pos=pos, inv_freq=inv_freq)
    assert_close(turned, rope(mean(raw), pos.gather(-1, idx), inv_freq))
    with pytest.raises(ValueError, match="without rotary positions"):
        merge_kv(k, v, idx, match, keys="pre_rope")
    with pytest.raises(ValueError, match="one of"):
        merge_kv(k, v, idx, match, keys="rope")
    with pytest.raises(ValueError, match="assign"):
        merge_kv(k, v, idx, Match(match.assign + 3, match.w_evict, match.w_self))


# --- inside a cache ------------------------------------------------------------------------------------------------


def merged_by_hand(policy, held, kept, memory, inv_freq):
    """What one head holds once only `kept` positions stay: {position: (key, value, count)}, token by token."""
    gone, out = sorted(set(held) - set(kept)), {p: list(held[p]) for p in kept}
    options, share = policy.merge.rule.keywords, {p: [] for p in kept}
    if "beta" in options:

        def space(p):
            k = held[p][0]
            return unrope(k[None], torch.tensor([p]), inv_freq)[0] if policy.merge.keys == "pre_rope" else k

        cosines = {i: [float(cosine_similarity(space(i), space(c), dim=0)) for c in kept] for i in gone}
        mean = sum(max(row) for row in cosines.values()) / len(gone)
        memory = mean if memory is None else options["beta"] * mean + (1 - options["beta"]) * memory
        for i, row in cosines.items():
            if max(row) >= memory - 1e-6:
                share[kept[row.index(max(row))]].append((i, math.exp(max(row))))
    else:
        shield = options["shield"]
        may = kept[shield.first : len(kept) - shield.last or None]
        for i in gone:
            near = min(may, key=lambda c: (abs(c - i), c))
            if options["reach"] is None or abs(near - i) <= options["reach"]:
                share[near].append((i, 1.0))
    for c, mine in share.items():
        own = math.e if "beta" in options else 1.0
        z = own + sum(w for _, w in mine)
        turned = {i: held[i][0] for i, _ in mine}
        if policy.merge.keys == "pre_rope":
            turned = {
                i: rope(unrope(k[None], torch.tensor([i]), inv_freq), torch.tensor([c]), inv_freq)[0]
                for i, k in turned.items()
            }
        if policy.merge.keys != "none":
            out[c][0] = (own * held[c][0] + sum(w * turned[i] for i, w in mine)) / z
        out[c][1] = (own * held[c][1] + sum(w * held[i][1] for i, w in mine)) / z
        out[c][2] = held[c][2] + sum(held[i][2] for i, _ in mine)
    return {p: tuple(x) for p, x in out.items()}, memory


@pytest.mark.parametrize(
    "name", sorted(MERGING - {"elastic_guarded"})
)  # there the heavy anchors are needed: their own test
def test_a_merging_cache_is_dense_attention_over_merged_tokens(name, model, assert_close):
    ids, policy = prompt(LENGTH + STEPS), PRESETS[name](BUDGET)
    parts, cache, got, kept = [LENGTH, *[1] * STEPS], PolicyCache(model.config, policy), [], []
    with torch.no_grad(), cache.on(model):
        for part in ids.split(parts, 1):
            got.append(model(part, past_key_values=cache).logits)
            kept.append([cache.positions(layer)[0].tolist() for layer in range(3)])
    inv_freq = model.model.rotary_emb.inv_freq

    def dense(layer, q, k, v, offset):
        out, group = torch.empty_like(q), q.shape[1] // k.shape[1]
        for head in range(k.shape[1]):
            held, memory, start = {}, None, 0
            for turn, size in enumerate(parts):
                fresh = {p: (k[0, head, p], v[0, head, p], 1.0) for p in range(start, start + size)}
                held |= fresh
                order = sorted(held)
                keys, values = (torch.stack([held[p][i] for p in order])[None, None] for i in (0, 1))
                bias = torch.tensor([held[p][2] for p in order]).log() if policy.merge.counts else None
                rows = slice(head * group, (head + 1) * group)
                out[:, rows, start : start + size] = attend(q[:, rows, start : start + size], keys, values, bias=bias)
                stay = kept[turn][layer][head]
                if policy.when == "always" or turn == 0:
                    held, memory = merged_by_hand(policy, held, stay, memory, inv_freq)
                held, start = {p: held[p] for p in stay}, start + size
        return out

    with torch.no_grad(), use_attention(model, dense):
        want = model(ids, use_cache=False).logits
    assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [True, False])
def test_equal_tokens_merge_without_loss_where_they_are_counted(counts, assert_close):
    """Tokens that come two and three times in a row, one of each kept: exact with log(count), and only with it."""
    q, few = torch.randn(1, 4, 10, 8, generator=generator()), torch.randn(2, 1, 2, 4, 8, generator=generator(4))
    k, v = few.repeat_interleave(torch.tensor([2, 3, 2, 3]), 3)
    idx = torch.tensor([0, 3, 5, 8]).expand(1, 2, -1)
    policy = elastic(0.5, keys="post_rope", counts=counts)
    state = policy.observe(policy.init(layers=1), 0, q, k, v, 0)
    state, (keys, values) = policy.fold(state, 0, k, v, idx, None)
    assert_close((keys, values), tuple(few))
    state = policy.took(state, 0, idx)
    bias = log_counts(state[0].stream, 0, 4)
    error = float((attend(q, keys, values, bias=bias, causal=False) - attend(q, k, v, causal=False)).abs().max())
    assert error < 1e-6 if counts else error > 1e-2
    if counts:
        assert state[0].stream.aux["count"][0].tolist() == [[2.0, 3.0, 2.0, 3.0]] * 2


def test_a_score_sees_the_counts_as_attention_does(assert_close):
    """What a step of attention gives merged tokens is what a score adds up: the rows sum to one."""
    policy = elastic(0.5, keys="post_rope", counts=True)._replace(when="always")
    q, k, v = (torch.randn(1, h, 20, 8, generator=generator(h)) for h in (4, 2, 2))
    state = policy.observe(policy.init(layers=1), 0, q, k, v, 0)
    idx = policy.plan(state, 0, 20)
    state, (keys, values) = policy.fold(state, 0, k, v, idx, None)
    state = policy.took(state, 0, idx)
    before, bias = state[0].stream.score, log_counts(state[0].stream, 2, 4)
    q, keys, values = q[:, :, :2], torch.cat((keys, k[:, :, :2]), 2), torch.cat((values, v[:, :, :2]), 2)
    _, lse = attend(q, keys, values, bias=bias, return_lse=True)
    for known in (lse, None):
        after = policy.observe(state, 0, q, keys, values, 10, known)[0].stream
        assert_close(after.score.sum(-1) - before.sum(-1), torch.full((1, 2), 2.0))
        assert after.aux["count"][0, 0, -2:].tolist() == [1.0, 1.0]


def test_d2o_with_an_infinite_threshold_is_eviction(model, assert_close):
    ids = prompt(LENGTH, rows=2)
    for keys in ("post_rope", "pre_rope", "none"):
        policy = exactly(d2o(0.5, first=2, keys=keys, threshold=math.inf), BUDGET)
        one, two = (prefill(model, ids, p).cache for p in (policy, policy._replace(merge=None)))
        for layer in range(3):
            assert torch.equal(one.layers[layer].keys, two.layers[layer].keys)
            assert torch.equal(one.layers[layer].values, two.layers[layer].values)


def test_rho_one_is_exact_with_equal_densities_only(llama, assert_close):
    ids = prompt(LENGTH)
    want = prefill(llama, ids)
    same = prefill(llama, ids, d2o(1.0, density=torch.full((3,), 7.0)))
    assert same.cache.held == [LENGTH] * 3
    assert_close(same.logits, want.logits)
    density = layer_density(prefill(llama, ids, keep_queries=True))
    assert prefill(llama, ids, d2o(1.0, density=density)).cache.held[int(density.argmax())] < LENGTH


def test_the_threshold_is_a_running_mean_for_every_head(llama):
    policy = exactly(d2o(0.5, first=2), BUDGET)
    _, cache, _ = prefill(llama, prompt(LENGTH), policy)
    before = [state.merged.clone() for state in cache.state]
    assert before[0].shape == (1, 2)
    continue_with(llama, cache, prompt(1))
    assert all(not torch.equal(state.merged, old) for state, old in zip(cache.state, before, strict=True))
    twin = cache.fork()
    twin.batch_repeat_interleave(3)
    assert twin.state[0].merged.shape == (3, 2)


def test_keys_that_are_nan_or_zero_are_never_merged():
    x = sides(5, 3)
    match = resembling(x._replace(k_evict=x.k_evict * 0), None, beta=0.7)
    assert float(match.w_evict.sum()) == 0
    with pytest.raises(ValueError, match="finite"):
        resembling(x._replace(k_evict=x.k_evict * torch.nan), None, beta=0.7)


# --- what is held while writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.81])
def test_elastic_holds_its_share_and_the_predicted_tokens(ratio, llama):
    length, steps, distance = 60, 40, -5
    _, cache, _ = prefill(llama, prompt(length), elastic(ratio, distance=distance))
    anchors = cache.positions(1)[0, 0].tolist()
    assert {0, length - 1} <= set(anchors)
    assert torch.equal(cache.positions(1)[0, 0], cache.positions(1)[0, 1])  # one choice for all heads
    for step in range(1, steps + 1):
        continue_with(llama, cache, prompt(1, seed=step))
        held = cache.positions(1)[0, 0].tolist()
        assert abs(len(held) - (length + step) * (1 - ratio)) < 1
        every = anchors + list(range(length, length + step))
        point = len(anchors) + distance
        assert held == every[:point] + every[len(every) - (len(held) - point) :]


def test_elastic_with_ratio_zero_changes_nothing(model, assert_close):
    ids = prompt(LENGTH + 3)
    logits, cache, _ = prefill(model, ids[:, :LENGTH], elastic(0.0))
    rest = continue_with(model, cache, ids[:, LENGTH:])
    with torch.no_grad():
        assert_close(torch.cat((logits[:, None], rest), 1), model(ids).logits[:, LENGTH - 1 :])


def test_what_cannot_be_is_refused(llama):
    with pytest.raises(ValueError, match="ratio"):
        elastic(1.0)
    cache = prefill(llama, prompt(LENGTH), elastic(0.5)).cache  # 12 anchors; the point would be 25 before their end
    with pytest.raises(ValueError, match="p within"):
        continue_with(llama, cache, prompt(1))
    for p, held in ((0, 6), (6, 6), (-1, 6)):
        with pytest.raises(ValueError, match="p within"):
            fixed_point(held, p, start=1)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="rows of one length"):
        prefill(llama, prompt(LENGTH, rows=2), elastic(0.5), mask=mask)
    filled = prefill(llama, prompt(LENGTH), keep_queries=True)
    filled.cache._inv_freq = None
    with pytest.raises(ValueError, match="without rotary positions"):
        compress(filled, elastic(0.5))


def test_a_fixed_point_is_one_deletion_after_another():
    left = torch.arange(20)
    for _ in range(5):
        left = torch.cat((left[:7], left[8:]))
    assert torch.equal(fixed_point(20, 7, 5), left)
    alive = torch.arange(20) >= torch.tensor([[3], [0]])
    got = fixed_point(20, 7, 5, alive=alive)
    assert torch.equal(got[1], left)
    assert got[0].tolist() == [*range(3, 10), *range(12, 20)]  # three of padding, then two at the point
