"""The mode switcher: chunk means and their average by hand, what it learns, what is refused."""

import pytest
import torch

from memlens.routing.switcher import chunk_means, decide, smooth, train_switcher


def test_the_average_of_one_chunk_is_its_mean(generator, assert_close):
    hidden = torch.randn(2, 100, 5, generator=generator)
    assert_close(smooth(chunk_means(hidden, chunk=128)), hidden.mean(1))


def test_the_average_by_hand(generator, assert_close):
    hidden = torch.randn(1, 10, 3, generator=generator)
    means = chunk_means(hidden, chunk=4)
    assert_close(means, torch.stack([hidden[:, :4].mean(1), hidden[:, 4:8].mean(1), hidden[:, 8:].mean(1)], 1))
    first, second, third = means.unbind(1)
    assert_close(smooth(means, alpha=0.5), 0.25 * first + 0.25 * second + 0.5 * third)
    assert_close(smooth(means, alpha=1.0), third)
    assert_close(smooth(means, alpha=0.0), first)


def test_padding_changes_nothing(generator, assert_close):
    short = torch.randn(1, 6, 3, generator=generator)
    padded = torch.cat((short, torch.full((1, 6, 3), 9.0)), 1)
    mask = torch.tensor([[1] * 6 + [0] * 6])
    assert_close(smooth(chunk_means(padded, chunk=4, mask=mask)), smooth(chunk_means(short, chunk=4)))
    left = torch.cat((torch.full((1, 4, 3), 9.0), short), 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    assert_close(smooth(chunk_means(left, chunk=4, mask=mask)), smooth(chunk_means(short, chunk=4)))


def test_it_learns_a_line_through_noise_and_is_the_same_each_time(generator):
    label = torch.arange(80) % 2
    summary = torch.randn(80, 16, generator=generator) + 2.0 * label[:, None] * torch.eye(16)[0]
    summary[:, 1] *= 1000  # a large channel that says nothing
    one, two = (train_switcher(summary, label, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one.w1.shape == (8, 16)
    p = decide(one, summary)
    assert float(((p > 0.5) == label.bool()).float().mean()) >= 0.8
    assert float(p.min()) >= 0 <= float(p.max()) <= 1


def test_bad_input_is_refused(generator):
    for call, word in [
        (lambda: train_switcher(torch.ones(4, 2), torch.ones(4), generator=generator), "both 0 and 1"),
        (lambda: train_switcher(torch.ones(4, 2), torch.arange(3), generator=generator), "shape"),
        (lambda: train_switcher(torch.ones(4, 2), torch.arange(4) % 2, generator=generator, dropout=1.0), "dropout"),
        (lambda: chunk_means(torch.ones(1, 4, 2), chunk=0), "chunk"),
        (lambda: smooth(torch.ones(1, 2, 2), alpha=1.5), "alpha"),
        (lambda: smooth(torch.full((1, 2, 2), float("nan"))), "nan"),
    ]:
        with pytest.raises(ValueError, match=word):
            call()
