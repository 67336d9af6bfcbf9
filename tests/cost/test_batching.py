"""A batch, iteration by iteration: nothing is lost, the limit holds, and a hand-made case comes out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.cost.devices import device
from memlens.cost.memory import LLAMA_7B
from memlens.cost.serving import (
    BATCHLLM,
    LRU,
    Batching,
    Request,
    parameters,
    prefix_tree,
    saved_tokens,
    shareable,
    simulate_batching,
    single_level,
    token_bytes,
)
from memlens.tasks.prefix_studies import mix

POLICIES = {"none": Batching("none"), "lru": LRU, "lru by ratio": Batching("lru", "ratio"), "grouped": BATCHLLM,
            "few": Batching("group", "arrival", most=2, chunk=16)}  # fmt: skip
REQUEST = st.builds(Request, st.lists(st.integers(0, 1), min_size=1, max_size=30).map(tuple), st.integers(1, 12))


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(requests=st.lists(REQUEST, min_size=1, max_size=25), spare=st.integers(0, 60))
def test_all_is_answered_within_the_limit(name, requests, spare):
    memory = max(len(request.prompt) + request.output for request in requests) + spare
    data = simulate_batching(requests, POLICIES[name], memory=memory)
    assert (data.memory <= memory).all()
    assert (data.memory >= 0).all()
    # the first token of each request comes with its prompt
    assert int(data.decode.sum()) == sum(request.output - 1 for request in requests)
    assert data.computed <= data.total
    assert (data.prefill + data.decode <= max(POLICIES[name].chunk, len(requests))).all()


@settings(max_examples=25, deadline=None)
@given(requests=st.lists(REQUEST, min_size=1, max_size=25))
def test_with_room_for_all_each_policy_saves_what_it_can(requests):
    prompts, total = [r.prompt for r in requests], sum(len(r.prompt) for r in requests)
    tree = prefix_tree(prompts)
    grouped, cached = (simulate_batching(requests, policy, memory=10_000) for policy in (BATCHLLM, LRU))
    slack = len(requests)  # a prompt that is wholly there still runs one token
    assert 0 <= grouped.computed + saved_tokens(single_level(tree)) - total <= slack
    assert 0 <= cached.computed + shareable(tree) - total <= slack
    assert simulate_batching(requests, Batching("none"), memory=10_000).computed == total


def test_two_requests_by_hand():
    requests = [Request((1, 2, 3, 4), 2), Request((1, 2, 3, 9), 1)]
    data = simulate_batching(requests, BATCHLLM, memory=100)
    assert data.prefill.values.tolist() == [5, 0]
    assert data.decode.values.tolist() == [0, 1]
    assert data.memory.values.tolist() == [3 + 1 + 2 + 1 + 1, 3 + 1 + 2]
    gpu, count = device("a100"), parameters(LLAMA_7B)
    floor = 2 * count / gpu.bandwidth
    assert data.time.values == pytest.approx([floor, floor + token_bytes(LLAMA_7B) * 4 / gpu.bandwidth])


def test_readers_of_one_prefix_read_it_once():
    requests = [Request((7,) * 50 + (i,), 20) for i in range(4)]
    apart, together = (simulate_batching(requests, Batching(share), memory=10_000) for share in ("lru", "group"))
    saved = (apart.time - together.time).values[1:]
    # three readers fewer for 50 tokens, in each decoding iteration
    np.testing.assert_allclose(saved, 3 * 50 * token_bytes(LLAMA_7B) / device("a100").bandwidth, rtol=1e-6)


def test_a_cache_that_is_too_small_forgets():
    family = [tuple([f] * 20) for f in range(4)]
    requests = [Request((*family[i % 4], 100 + i), 1) for i in range(16)]
    roomy, tight = (simulate_batching(requests, Batching("lru", most=1), memory=memory) for memory in (1000, 45))
    assert roomy.computed == 4 * 20 + 16
    assert tight.computed == 16 * 21  # each family is gone when it comes again
    assert simulate_batching(requests, Batching("group", "ratio", most=1), memory=45).computed == roomy.computed


def test_the_mix_is_what_it_says(generator):
    requests = mix(generator, requests=60, families=5, output=(3, 9))
    again = mix(torch.Generator().manual_seed(0), requests=60, families=5, output=(3, 9))
    assert requests == again
    assert all(3 <= request.output <= 9 and 250 <= len(request.prompt) <= 1100 for request in requests)
    assert len({request.prompt[:200] for request in requests}) <= 5


def test_refusals():
    with pytest.raises(ValueError, match="a request of 12 tokens; expected at most 11"):
        simulate_batching([Request((1,) * 10, 2)], memory=11)
    with pytest.raises(ValueError, match="share='lrru'"):
        simulate_batching([Request((1,), 1)], Batching("lrru"))
    with pytest.raises(ValueError, match="output=0"):
        simulate_batching([Request((1,), 0)])
    with pytest.raises(ValueError, match="requests=0"):
        simulate_batching([])
    with pytest.raises(ValueError, match="chunk=0"):
        simulate_batching([Request((1,), 1)], Batching(chunk=0))
