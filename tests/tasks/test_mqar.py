"""Associative recall: rows that a perfect memory solves, and nothing else about them that helps."""

import pytest
import torch

from memlens.models.mqar import ARMS, build, file_of, load
from memlens.tasks.mqar import mqar, mqar_batches, recall_accuracy

SIZES = {"8 pairs": {"pairs": 8}, "16 pairs": {"pairs": 16}, "tight": {"pairs": 5, "length": 20, "vocab": 14}}


def matcher(tokens, pairs):
    """A perfect memory of the pairs, as logits."""
    keys, values = tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
    hit = tokens[:, :, None] == keys[:, None]
    return torch.nn.functional.one_hot((hit * values[:, None]).sum(-1), 256).double()


@pytest.mark.parametrize("size", SIZES)
def test_a_perfect_memory_scores_one_and_filler_binds_nothing(size, generator):
    tokens, targets = mqar(200, generator=generator, **SIZES[size])
    pairs, vocab = SIZES[size]["pairs"], SIZES[size].get("vocab", 256)
    assert recall_accuracy(matcher(tokens, pairs), targets) == 1.0
    assert ((targets != -100).sum(1) == pairs).all()
    keys, rest = tokens[:, 0 : 2 * pairs : 2], tokens[:, 2 * pairs :]
    asked = targets[:, 2 * pairs :] != -100
    bound = (rest[:, :, None] == keys[:, None]).any(-1)
    assert (bound == asked).all()  # a bound key comes again exactly where it is asked for
    assert rest.max() < vocab // 2 <= targets[targets != -100].min()
    assert (keys.sort(1).values.diff(dim=1) > 0).all()


def test_the_same_generator_gives_the_same_rows():
    first, second = (mqar(5, pairs=4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(first, second)


def test_gaps_follow_the_power_law(generator):
    """One pair: slot s is drawn with weight s^(a - 1); the share of each slot lies within 4 standard deviations."""
    count, a = 40_000, 0.5
    _, targets = mqar(count, pairs=1, length=22, gap_power=a, generator=generator)
    share = (targets[:, 2::2] != -100).double().mean(0)
    want = torch.arange(1, 11, dtype=torch.float64) ** (a - 1)
    want /= want.sum()
    assert ((share - want).abs() < 4 * (want * (1 - want) / count).sqrt()).all()


def test_batches_take_the_pairs_in_turn(generator):
    source = mqar_batches(3, pairs=(2, 5), generator=generator, length=24)
    assert [int((next(source)[1] != -100).sum()) for _ in range(4)] == [6, 15, 6, 15]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pairs": 0}, "pairs=0"),
        ({"length": 31}, "length=31"),
        ({"vocab": 19}, "vocab=19"),
        ({"gap_power": 0}, "gap_power"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, generator):
    with pytest.raises(ValueError, match=message):
        mqar(2, **{"pairs": 8, "generator": generator, **change})


def test_accuracy_refuses_rows_without_a_question():
    with pytest.raises(ValueError, match="no target"):
        recall_accuracy(torch.zeros(1, 3, 5), torch.full((1, 3), -100))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_causal_and_its_shipped_weights_fit(arm, generator):
    tokens, _ = mqar(2, pairs=8, generator=generator)
    fresh, model = build(arm), load(arm)
    changed = tokens.clone()
    changed[:, 100:] = 1
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :100], model(changed)[:, :100])
    differs = [not torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True)]
    assert all(differs)
    assert file_of(arm).endswith(".safetensors")


def test_an_unknown_arm_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'based'"):
        build("base")
