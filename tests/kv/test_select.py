"""Selection: exact counts, protected ends, ties, padding; and the state that travels with the keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.kv.select import complement, extend, gather_kv, positions, repeat, stream, take, topk_keep


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_topk_keep_holds_its_promises(data):
    length = data.draw(st.integers(1, 30))
    first, last = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    budget = data.draw(st.integers(max(1, first + last), 35))
    values = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("inf")]), min_size=length, max_size=length))
    kept = topk_keep(torch.tensor(values), budget, first=first, last=last).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == min(budget, length)
    ends = set(range(min(first, length))) | set(range(max(0, length - last), length))
    assert ends <= set(kept)
    free = [i for i in range(length) if i not in ends]
    ranked = sorted(free, key=lambda i: (-values[i], i))  # ties to the lower index
    assert set(kept) - ends == set(ranked[: len(kept) - len(ends & set(kept))])


def test_protection_is_a_set_and_no_score_can_beat_it():
    score = torch.tensor([0.0, torch.inf, torch.inf, torch.inf, 0.0])
    assert topk_keep(score, 3, first=1, last=1).tolist() == [0, 1, 4]


def test_padding_goes_first_and_is_never_protected():
    score = torch.tensor([9.0, 9.0, 0.0, 1.0, 2.0, 3.0])
    alive = torch.tensor([False, False, True, True, True, True])
    assert topk_keep(score, 3, first=1, last=1, alive=alive).tolist() == [2, 4, 5]
    assert topk_keep(score, 5, alive=alive).tolist() == [0, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget >= 1"),
        ({"budget": 3, "first": 2, "last": 2}, "budget >= 4"),
        ({"budget": 3, "first": -1}, "first >= 0"),
    ],
)
def test_bad_budgets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        topk_keep(torch.zeros(9), **options)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        topk_keep(torch.tensor([0.0, float("nan")]), 1)


def test_complement_and_gather(generator, assert_close):
    idx = topk_keep(torch.rand(2, 3, 10, generator=generator), 4)
    rest = complement(idx, 10)
    assert rest.shape == (2, 3, 6)
    assert torch.equal(torch.cat((idx, rest), -1).sort(-1).values, torch.arange(10).expand(2, 3, 10))
    k, v = torch.randn(2, 3, 10, 5, generator=generator), torch.randn(2, 3, 10, 7, generator=generator)
    kept_k, kept_v = gather_kv(k, v, idx)
    for b in range(2):
        for h in range(3):
            assert torch.equal(kept_k[b, h], k[b, h, idx[b, h]])
            assert torch.equal(kept_v[b, h], v[b, h, idx[b, h]])
    assert kept_k.untyped_storage().nbytes() == kept_k.numel() * 4
    for bad, message in ((torch.tensor([[[10]]]), "within"), (torch.tensor([[[1, 1]]]), "each index once")):
        with pytest.raises(ValueError, match=message):
            complement(bad, 10)


def test_scores_and_positions_travel_with_the_kept_tokens():
    state = extend(stream(1, 1), torch.tensor([[[1.0, 2.0, 3.0]]]))
    state = take(state, torch.tensor([[[0, 2]]]))
    state = extend(state, torch.tensor([[[10.0, 10.0, 10.0]]]))
    assert state.score.tolist() == [[[11.0, 13.0, 10.0]]]
    assert state.pos.tolist() == [[[0, 2, 3]]]
    assert state.step == 4
    with pytest.raises(ValueError, match="new_score >= 3"):
        extend(state, torch.zeros(1, 1, 2))


def test_what_else_is_known_is_gathered_too():
    state = extend(stream(1, 2)._replace(aux={"a": torch.arange(12.0).view(1, 2, 2, 3)}), torch.zeros(1, 2, 3))
    kept = take(state, torch.tensor([[[1], [2]]]))
    assert kept.aux["a"].tolist() == [[[[1.0], [4.0]], [[8.0], [11.0]]]]
    assert repeat(kept, 2).aux["a"].shape == (2, 2, 2, 1)
    with pytest.raises(ValueError, match="aux"):
        extend(kept, torch.zeros(1, 2, 2))


def test_padding_has_negative_positions():
    assert positions(stream(2, 1), 3, torch.tensor([0, 2])).tolist() == [[[0, 1, 2]], [[-2, -1, 0]]]
