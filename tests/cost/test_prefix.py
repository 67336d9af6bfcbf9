"""Prefix trees and their groups: whole, bounded by each other, and the best equals trying everything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.cost.serving import Group, order_groups, prefix_tree, saved_tokens, shareable, single_level
from memlens.tasks.prefix_studies import brute_force, common

PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=7)
LARGE = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=60)


@given(prompts=LARGE)
def test_a_tree_spells_its_prompts(prompts):
    spelled, todo = {}, [(prefix_tree(prompts), ())]
    while todo:
        node, before = todo.pop()
        here = before + node.tokens
        spelled |= dict.fromkeys(node.requests, here)
        firsts = [child.tokens[0] for child in node.children]
        assert len(set(firsts)) == len(firsts)
        # compact: an inner node below the root branches or ends a request
        assert (not before and not node.tokens) or len(node.children) != 1 or node.requests
        todo += [(child, here) for child in node.children]
    assert [list(spelled[i]) for i in range(len(prompts))] == prompts


@settings(max_examples=80, deadline=None)
@given(prompts=LARGE)
def test_every_request_is_in_one_group_that_really_shares(prompts):
    tree = prefix_tree(prompts)
    values = []
    for method in ("greedy", "optimal"):
        groups = single_level(tree, method)
        assert sorted(i for group in groups for i in group.requests) == list(range(len(prompts)))
        assert all(common([prompts[i] for i in group.requests]) >= group.prefix for group in groups)
        values.append(saved_tokens(groups))
        computed = sum(g.prefix + sum(len(prompts[i]) - g.prefix for i in g.requests) for g in groups)
        assert computed + values[-1] == sum(map(len, prompts))
    assert 0 <= values[0] <= values[1] <= shareable(tree) < sum(map(len, prompts))


@settings(max_examples=80, deadline=None)
@given(prompts=PROMPTS)
def test_the_optimum_is_what_trying_everything_finds(prompts):
    assert saved_tokens(single_level(prefix_tree(prompts), "optimal")) == brute_force(prompts)


def test_eight_requests_too(generator):
    import torch

    for _ in range(5):
        prompts = [
            torch.randint(2, (n,), generator=generator).tolist() for n in torch.randint(4, 12, (8,), generator=generator)
        ]
        assert saved_tokens(single_level(prefix_tree(prompts), "optimal")) == brute_force(prompts)


def test_the_greedy_rule_by_hand():
    # c has 2 tokens, x below it 3 and two leaves: (2 - 1)·3 > 2, so x leaves c's group
    prompts = [[1, 1, 2, 2, 2, 8], [1, 1, 2, 2, 2, 9], [1, 1, 5], [1, 1, 6]]
    assert single_level(prefix_tree(prompts)) == [Group(5, (0, 1)), Group(2, (2, 3))]
    # with 2 tokens it stays
    prompts = [[1, 1, 2, 2, 8], [1, 1, 2, 2, 9], [1, 1, 5], [1, 1, 6]]
    assert single_level(prefix_tree(prompts)) == [Group(2, (0, 1, 2, 3))]


def test_where_greedy_loses():
    # both halves of c leave it, so c's tokens are lost once; the rule counts them twice and keeps both
    prompts = [[1, 1, 1, 2, 2, 8], [1, 1, 1, 2, 2, 9], [1, 1, 1, 3, 3, 8], [1, 1, 1, 3, 3, 9]]
    tree = prefix_tree(prompts)
    assert saved_tokens(single_level(tree)) == 9
    assert saved_tokens(single_level(tree, "optimal")) == 10 == brute_force(prompts)
    assert shareable(tree) == 13


def test_equal_prompts_share_all_and_a_chain_does_not_overflow():
    assert saved_tokens(single_level(prefix_tree([[1, 2, 3]] * 4))) == 9
    chain = [[0] * n for n in range(1, 1501)]
    tree = prefix_tree(chain)
    assert shareable(tree) == sum(range(1500))
    assert saved_tokens(single_level(tree)) <= saved_tokens(single_level(tree, "optimal"))


def test_long_writers_come_first():
    groups = [Group(10, (0, 1)), Group(0, (2,)), Group(4, (3, 4))]
    lengths, outputs = [12, 14, 10, 6, 8], [1, 1, 30, 5, 6]
    assert [group.requests for group in order_groups(groups, lengths, outputs)] == [(2,), (3, 4), (0, 1)]


def test_refusals():
    with pytest.raises(ValueError, match="requests=0"):
        prefix_tree([])
    with pytest.raises(ValueError, match="length=0; expected length >= 1; give every prompt a token"):
        prefix_tree([[1], []])
    with pytest.raises(ValueError, match="method='best'"):
        single_level(prefix_tree([[1]]), "best")
