"""Keys as factors: exact at full rank, the best there is at any other, and the same through the cache of a model."""

from functools import partial

import pytest
import torch
from kv_presets import PRESETS, full, prompt

from memlens.attention.rope import frequencies, rope
from memlens.cost.storage import shadow_bytes
from memlens.kv import storage
from memlens.kv.cache import PolicyCache, compress, continue_with, prefill
from memlens.kv.lowrank import energy, joint_svd, low_rank, reconstruct
from memlens.kv.retrieval import instinfer, shadowkv
from memlens.kv.select import chunk_landmarks, outlier_chunks

FREQ = frequencies(8)  # of the tiny models with heads of 8


def shadow(**plan):
    return shadowkv(FREQ, **{"rank": 16, "budget": 8, "chunk": 4, "outliers": 1, "local": 1} | plan)


@pytest.mark.parametrize("length", [5, 16, 40])
def test_full_rank_is_exact_and_less_is_the_best_there_is(length, generator, assert_close):
    k = torch.randn(2, 3, length, 4, generator=generator)
    full_rank = min(length, 12)
    assert_close(reconstruct(*joint_svd(k, full_rank)), k, rtol=1e-4, atol=1e-4)
    flat = k.transpose(1, 2).reshape(2, length, 12)
    values = torch.linalg.svdvals(flat)
    for rank in (1, 3, full_rank - 1):
        factors = joint_svd(k, rank)
        assert factors.u.shape == (2, length, rank)
        assert factors.sv.shape == (2, 3, rank, 4)
        lost = (reconstruct(*factors) - k).square().sum((1, 2, 3))
        assert_close(lost, values[:, rank:].square().sum(-1))  # Eckart and Young: no matrix of this rank is nearer
        assert_close(1 - lost / k.square().sum((1, 2, 3)), energy(k)[:, rank - 1])
        assert_close(factors.u.mT @ factors.u, torch.eye(rank).expand(2, -1, -1))


def test_some_rows_are_a_slice_of_all(generator, assert_close):
    k = torch.randn(2, 3, 20, 8, generator=generator)
    factors, rotate = joint_svd(k, 7), partial(rope, inv_freq=FREQ)
    idx = torch.randint(0, 20, (2, 3, 6), generator=generator)
    for turn in (None, rotate):
        assert_close(reconstruct(*factors, idx, turn), storage.take(reconstruct(*factors, rotate=turn), idx))


def test_bad_ranks_rows_and_numbers_are_refused(generator):
    k = torch.randn(1, 2, 6, 4, generator=generator)
    for rank in (0, 7):
        with pytest.raises(ValueError, match=r"rank.*within \[1, 6\]"):
            joint_svd(k, rank)
    with pytest.raises(ValueError, match="idx=6"):
        reconstruct(*joint_svd(k, 2), torch.full((1, 2, 1), 6))
    k[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        joint_svd(k, 2)


def test_landmarks_and_outliers_by_hand(assert_close):
    even = torch.tensor([[1.0, 2.0]]).expand(4, -1)
    odd = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-0.9, 0.1]])
    k = torch.cat((even, odd, 3 * even))[None, None]
    landmarks = chunk_landmarks(k, 4)
    assert_close(landmarks[0, 0], torch.tensor([[1.0, 2.0], [0.525, 0.025], [3.0, 6.0]]))
    cosine = torch.nn.functional.cosine_similarity(k[0, 0, :4], landmarks[0, 0, :1])
    assert_close(cosine, torch.ones(4))
    assert outlier_chunks(k, landmarks, 1).tolist() == [[[1]]]
    assert outlier_chunks(k, landmarks, 2).tolist() == [[[0, 1]]]  # a tie at cosine 1 goes to the lower chunk
    assert outlier_chunks(k, landmarks, 0).shape == (1, 1, 0)
    with pytest.raises(ValueError, match="no multiple"):
        chunk_landmarks(k[:, :, :11], 4)
    with pytest.raises(ValueError, match=r"within \[0, 2\]"):
        outlier_chunks(k, landmarks, 3)


# --- in the cache of a model ---------------------------------------------------------------------------------------

STORES = {
    "low_rank": lambda: low_rank(9, FREQ),
    "low_rank_rotated": lambda: low_rank(9),
    "shadow": shadow,
    "shadow_thin": lambda: shadow(rank=5, outliers=2, budget=4),
}
EXACT = {
    "low_rank": lambda: low_rank(16, FREQ),
    "low_rank_rotated": lambda: low_rank(99),
    "shadow": lambda: shadow(budget=400),
    "instinfer": lambda: instinfer(8, 1.0),
}


@pytest.mark.parametrize("store", EXACT)
def test_full_rank_and_budget_change_nothing(store, llama, assert_close):
    ids = prompt(40)
    cache = prefill(llama, ids[:, :30], full().stored(EXACT[store]())).cache
    got = torch.cat([continue_with(llama, cache, part) for part in (ids[:, 30:31], ids[:, 31:37], ids[:, 37:])], 1)
    with torch.no_grad():
        assert_close(got, llama(ids).logits[:, 30:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("store", [*STORES, "instinfer"])
def test_rows_together_are_rows_one_by_one(store, llama, assert_close):
    fmt = STORES[store]() if store in STORES else instinfer(3, 10)
    ids = prompt(42)
    one, two = (prefill(llama, ids[:, :36], full().stored(fmt), chunk).cache for chunk in (None, 36))
    together = continue_with(llama, one, ids[:, 36:])
    alone = torch.cat([continue_with(llama, two, ids[:, i : i + 1]) for i in range(36, 42)], 1)
    assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert one.held == [42] * 3
    with torch.no_grad():
        assert float((llama(ids).logits[:, 36:] - alone).abs().max()) > 1e-3  # it did read less than all


@pytest.mark.parametrize("store", ["low_rank", "shadow"])
def test_a_prompt_in_parts_and_compressed_later_is_one(store, llama, assert_close):
    ids, policy = prompt(37), full().stored(STORES[store]())
    direct, parts = (prefill(llama, ids, policy, chunk).cache for chunk in (None, 10))
    late = compress(prefill(llama, ids, keep_queries=True), policy)
    want = continue_with(llama, direct.fork(), prompt(3))
    for cache in (parts, late):
        assert_close(continue_with(llama, cache, prompt(3)), want, rtol=1e-4, atol=1e-4)
    direct.batch_repeat_interleave(2)
    rows = continue_with(llama, direct, prompt(3).expand(2, -1))
    assert_close(rows, want.expand(2, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("store", [*STORES, "instinfer"])
@pytest.mark.parametrize("length", [30, 37])
def test_bytes_are_the_formula_and_what_is_held(store, length, generator):
    fmt = STORES[store]() if store in STORES else instinfer(3, 10)
    k, v = (torch.randn(2, 2, length, 8, generator=generator) for _ in range(2))
    held = fmt.commit(None, k, v)
    parts = {part: size for part, size in storage.held_bytes(fmt.parts(held)).items() if size}
    assert parts == fmt.size((2, 2, length, 8))
    listed = {x.data_ptr() for tensors in fmt.parts(held).values() for x in tensors if x.numel()}
    assert {x.data_ptr() for x in storage.tensors(held) if x.numel()} == listed
    grown = fmt.commit(held, k[:, :, :3], v[:, :, :3])
    more = sum(storage.held_bytes(fmt.parts(grown)).values()) - sum(parts.values())
    assert more == 2 * 2 * 2 * 3 * 8 * 4  # three tokens as they are
    assert fmt.count(grown) == length + 3


def test_fast_memory_of_shadowkv_is_the_formula_of_the_paper():
    """Per token 160 + 128 numbers of 2,048 at eight kv heads of 128; the rest is constant in the length."""
    one, two = (shadow_bytes(8 * n, 8, 128, itemsize=1) for n in (10_000, 10_001))
    assert (two["factors"] - one["factors"], two["landmarks"] - one["landmarks"]) == (8 * 160, 8 * 128)
    assert two["slow"] - one["slow"] == 8 * 1024
    for part in ("outliers", "local", "fetched"):
        assert one[part] == two[part]
    assert one["outliers"] == 48 * 8 * 2048
    assert one["fetched"] == 2048 * 2048
    with pytest.raises(ValueError, match="make 48 chunks"):
        shadow_bytes(8 * 52, 8, 128)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("store", ["low_rank", "shadow"])
def test_heads_that_keep_different_tokens_share_no_factors(name, store):
    with pytest.raises(ValueError, match=r"must hold the same tokens|rewrites tokens"):
        PRESETS[name](20).stored(STORES[store]())


def test_what_retrieval_cannot_do_is_refused(llama):
    cache = PolicyCache(llama.config, full().stored(instinfer(3, 4)))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    with cache.on(llama), torch.no_grad():
        llama(prompt(12, rows=2), past_key_values=cache, attention_mask=mask)
    with pytest.raises(RuntimeError, match="run prompts of one length"):
        continue_with(llama, cache, prompt(1, rows=2), mask=torch.nn.functional.pad(mask, (0, 1), value=1))
    with pytest.raises(ValueError, match="besides 1 local"):
        prefill(llama, prompt(9), full().stored(shadow()))
    with pytest.raises(ValueError, match="share within"):
        instinfer(3, 1.5)
    for bad in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match="expected"):
            instinfer(*bad)


def test_generate_is_the_manual_loop(llama):
    ids, policy = prompt(30), full().stored(shadow(rank=7))
    cache = PolicyCache(llama.config, policy)
    with cache.on(llama):
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        made = llama.generate(ids, past_key_values=cache, **options)
    logits, cache, _ = prefill(llama, ids, policy)
    loop = [logits.argmax(-1)]
    while len(loop) < 6:
        loop.append(continue_with(llama, cache, loop[-1][:, None])[:, -1].argmax(-1))
    assert made[0, 30:].tolist() == [int(token) for token in loop]
