"""The two caches: prompts, credit and eviction by hand; thresholds, lifetimes and quotas over a random trace."""

import importlib.util
import math

import pytest
import torch
from torch.nn.functional import normalize

from memlens.recall.index import cells
from memlens.recall.store import CategoryPolicy, Example, ExampleCache, SemanticCache

needs_usearch = pytest.mark.skipif(importlib.util.find_spec("usearch") is None, reason="pip install memlens[recall]")
KINDS = ["flat", pytest.param("hnsw", marks=needs_usearch)]
E = torch.eye(8)


def at(cosine, axis=0, other=1):
    """A unit vector at this cosine to an axis."""
    return cosine * E[axis] + math.sqrt(1 - cosine**2) * E[other]


def examples(*names):
    cache = ExampleCache.empty(8)
    for place, name in enumerate(names):
        cache = cache.insert(Example(f"ask {name}", f"say {name}", tokens=10), E[place])
    return cache


def test_an_empty_cache_gives_the_zero_shot_prompt():
    empty = ExampleCache.empty(8)
    idx, cosine = empty.near(E[0])
    assert empty.prompt("who?", idx) == "Request: who?\nAnswer:" == examples("a").prompt("who?")
    assert len(cosine) == 0


def test_the_best_example_stands_next_to_the_request():
    text = examples("a", "b", "c").prompt("now?", [2, 0])
    assert text == "Request: ask a\nAnswer: say a\n\nRequest: ask c\nAnswer: say c\n\nRequest: now?\nAnswer:"


def test_near_is_sorted_by_cosine_with_and_without_an_index(generator):
    cache = examples("a", "b", "c")
    query = normalize(torch.tensor([0.5, 0.1, 0.8, 0, 0, 0, 0, 0]), dim=0)
    idx, cosine = cache.near(query, 2)
    assert idx.tolist() == [2, 0]
    torch.testing.assert_close(cosine, query[[2, 0]])
    again, _ = cache.near(query, 2, index=cells(cache.vectors, count=2, generator=generator), probe=2)
    assert again.tolist() == [2, 0]


def test_credit_is_shared_decays_and_decides_who_stays():
    cache = examples("a", "b", "c").credit([0, 2], gain=0.5, offload=1.0).credit([2], gain=0.0, offload=1.0)
    assert [(e.uses, e.past, e.value) for e in cache.examples] == [(1, 0.5, 0.5), (0, 0.0, 0.0), (2, 0.25, 1.5)]
    assert [e.value for e in cache.decay(0.9).examples] == pytest.approx([0.45, 0.0, 1.35])
    kept = cache.evict(cache.nbytes[0] + cache.nbytes[2] - 1)
    assert [e.request for e in kept.examples] == ["ask c"]
    assert torch.equal(kept.vectors, E[2:3])
    assert sum(kept.nbytes) <= cache.nbytes[0] + cache.nbytes[2] - 1
    assert cache.evict(0).examples == ()


def test_a_replay_keeps_the_better_answer():
    cache = ExampleCache.empty(8).insert(Example("q", "old", quality=0.5), E[0])
    assert cache.replayed(0, "worse", 0.4).examples[0].answer == "old"
    assert cache.replayed(0, "better", 0.9).examples[0][:3] == ("q", "better", 0.9)
    assert cache.examples[0].answer == "old"  # the old value is untouched


@pytest.mark.parametrize(
    ("example", "vector"),
    [(Example("", "a"), E[0]), (Example("q", " "), E[0]), (Example("q", "a", 1.5), E[0]), (Example("q", "a"), 2 * E[0]),
     (Example("q", "a"), torch.ones(7) / 7**0.5), (Example("q", "a"), E[0] * float("nan"))],
)  # fmt: skip
def test_a_bad_example_is_refused(example, vector):
    with pytest.raises(ValueError, match=r"[cC]ache"):
        ExampleCache.empty(8).insert(example, vector)


# --- answers ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_hit_is_near_enough_alive_and_of_the_category(kind):
    cache = SemanticCache({"chat": CategoryPolicy(0.75, ttl=10), "code": CategoryPolicy(0.9)}, index=kind, dim=8)
    cache.insert("hello", E[0], "chat", "hi", now=0)
    hit = cache.lookup("hello there", at(0.8), "chat", now=9)
    assert (hit.answer, hit.text, hit.age) == ("hi", "hello", 9)
    assert hit.cosine == pytest.approx(0.8)
    assert cache.lookup("x", at(0.7), "chat", now=9) is None
    assert cache.lookup("x", at(0.99), "code", now=9) is None
    assert cache.lookup("hello", E[0], "chat", now=10) is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_eligible_entry_behind_many_others_is_found(kind):
    cache = SemanticCache({"a": CategoryPolicy(0.5), "b": CategoryPolicy(0.5)}, index=kind, dim=8)
    for number in range(60):
        cache.insert(f"other {number}", at(0.999 - number / 1e4), "b", number, now=0)
    cache.insert("mine", at(0.6), "a", "answer", now=0)
    assert cache.lookup("ask", E[0], "a", now=1).answer == "answer"


def test_threshold_one_is_the_same_text_only():
    cache = SemanticCache({"a": CategoryPolicy(1.0)}, dim=8)
    cache.insert("exactly", E[0], "a", 1, now=0)
    assert cache.lookup("Exactly", E[0], "a", now=0) is None
    assert cache.lookup("exactly", at(0.99999), "a", now=0).answer == 1


def test_a_full_category_loses_what_was_used_least_recently():
    cache = SemanticCache({"a": CategoryPolicy(0.9, quota=2), "b": CategoryPolicy(0.9)}, dim=8)
    for place in (0, 1):
        cache.insert(f"{place}", E[place], "a", place, now=place)
    cache.insert("b", E[7], "b", "b", now=2)
    assert cache.lookup("0", E[0], "a", now=3).answer == 0
    cache.insert("2", E[2], "a", 2, now=4)
    assert cache.lookup("1", E[1], "a", now=5) is None
    assert [cache.lookup("", E[place], "a", now=6).answer for place in (0, 2)] == [0, 2]
    assert (cache.count("a"), cache.count("b"), len(cache), len(cache.documents)) == (2, 1, 3, 3)


def test_a_full_cache_takes_from_the_lowest_priority():
    policies = {"high": CategoryPolicy(0.9, priority=2), "low": CategoryPolicy(0.9, priority=1)}
    cache = SemanticCache(policies, dim=8, capacity=3)
    for place, category in enumerate(["low", "high", "low", "high"]):
        cache.insert(str(place), E[place], category, place, now=place)
    assert (cache.count("high"), cache.count("low")) == (2, 1)
    assert cache.lookup("0", E[0], "low", now=9) is None


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_random_trace_nothing_stale_is_served_and_no_quota_is_exceeded(kind, generator):
    policies = {"slow": CategoryPolicy(0.8, quota=7), "fast": CategoryPolicy(0.8, ttl=5.0, quota=4)}
    cache, vectors, hits = (
        SemanticCache(policies, index=kind, dim=8),
        normalize(torch.randn(30, 8, generator=generator), dim=-1),
        0,
    )
    for now in range(600):
        place = int(torch.randint(30, (), generator=generator))
        category = "fast" if place % 2 else "slow"
        hit = cache.lookup(str(place), vectors[place], category, now=now)
        if hit is None:
            cache.insert(str(place), vectors[place], category, (category, now), now=now)
        else:
            hits += 1
            owner, written = hit.answer
            assert owner == category
            assert now - written == hit.age < policies[category].ttl
            assert hit.cosine >= 0.8 - 1e-6
        assert cache.count("slow") <= 7
        assert cache.count("fast") <= 4
        assert len(cache) == len(cache.documents) == cache.count("slow") + cache.count("fast")
    assert hits > 50


def test_load_loosens_a_lookup_and_old_answers_come_back():
    cache = SemanticCache({"a": CategoryPolicy(0.9, ttl=10, floor=0.85)}, dim=8)
    cache.insert("x", E[0], "a", 1, now=0)
    assert cache.lookup("y", at(0.87), "a", now=1) is None
    assert cache.lookup("y", at(0.87), "a", now=1, load=1.0).answer == 1
    assert cache.lookup("y", at(0.84), "a", now=1, load=1.0, delta=0.5) is None
    assert cache.lookup("x", E[0], "a", now=15) is None
    assert cache.lookup("x", E[0], "a", now=15, load=1.0).answer == 1


def test_a_disabled_category_neither_stores_nor_answers():
    cache = SemanticCache({"a": CategoryPolicy(0.5, enabled=False)}, dim=8)
    cache.insert("x", E[0], "a", 1, now=0)
    assert len(cache) == 0
    assert cache.lookup("x", E[0], "a", now=0) is None


@pytest.mark.parametrize(
    "policy",
    [CategoryPolicy(1.1), CategoryPolicy(-0.1), CategoryPolicy(math.nan), CategoryPolicy(0.8, ttl=0), CategoryPolicy(0.8, quota=0),
     CategoryPolicy(0.8, floor=0.9)],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused(policy):
    with pytest.raises(ValueError, match="SemanticCache 'a'"):
        SemanticCache({"a": policy})


def test_bad_calls_are_refused_and_leave_the_cache_alone():
    cache = SemanticCache({"chat": CategoryPolicy(0.8)}, dim=8)
    cache.insert("x", E[0], "chat", 1, now=5)
    for call, word in [
        (lambda: cache.lookup("x", E[0], "chta", now=6), "did you mean 'chat'"),
        (lambda: cache.lookup("x", 3 * E[0], "chat", now=6), "vector_norm"),
        (lambda: cache.insert("x", E[0], "chat", 2, now=4), "backwards"),
        (lambda: cache.lookup("x", E[0], "chat", now=6, load=2.0), "load"),
        (lambda: SemanticCache({}), "policies"),
    ]:
        with pytest.raises(ValueError, match=word):
            call()
    assert len(cache) == 1
    assert cache.lookup("x", E[0], "chat", now=6).answer == 1
