"""Column statistics against softmax written out, the torch form against the reference, and the small scores."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memlens.kv import score
from memlens.kv.score import column_mass, group_heads, hit_rate, retained_mass, smooth, surprisal

CASES = [("sum", None), ("mean", None), ("max", None), ("last", None), ("count_above", 0.03), ("count_below", "1/t")]


def inputs(generator, batch=2, heads=6, kv_heads=2, rows=63, length=63, dim=24):
    q, k = (torch.randn(batch, h, n, dim, generator=generator) for h, n in ((heads, rows), (kv_heads, length)))
    return q, k


def probabilities(q, k, alive=None):
    """P (B, H, Lq, L) through torch's own masked softmax."""
    rows, length = q.shape[2], k.shape[2]
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = torch.ones(rows, length, dtype=torch.bool).triu(length - rows + 1)
    if alive is not None:
        hidden = hidden | ~alive[:, None, None]
    return s.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("padded", [False, True])
def test_every_statistic_is_that_of_the_softmax(form, padded, generator, assert_close):
    q, k = inputs(generator)
    alive = torch.arange(63) >= torch.tensor([[0], [7]]) if padded else None
    p = probabilities(q, k, alive)
    seen = p > 0
    visible = seen.sum(2).clamp(min=1)
    want = {
        "sum": p.sum(2), "mean": p.sum(2) / visible, "max": p.amax(2), "last": p[:, :, -1],
        "count_above": (p > 0.03).sum(2).float(),
        "count_below": (seen & (p < (1 - 1e-5) / seen.sum(-1, keepdim=True))).sum(2).float(),
    }  # fmt: skip
    for reduce, threshold in CASES:
        got = column_mass(q, k, reduce=reduce, threshold=threshold, alive=alive, group="none", form=form)
        assert_close(got, want[reduce])


@pytest.mark.parametrize(
    "sizes", [(1, 4, 4, 1, 1, 8), (1, 4, 2, 5, 130, 16), (2, 3, 1, 64, 130, 40), (1, 2, 2, 130, 130, 8)]
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_the_torch_form_gives_the_reference(sizes, with_lse, generator, assert_close, monkeypatch):
    monkeypatch.setattr(score, "TILE", 1000)  # many blocks of rows even at these sizes
    q, k = inputs(generator, *sizes)
    lse = torch.randn(q.shape[:3], generator=generator) + 3 if with_lse else None
    for reduce, threshold in CASES:
        for group in ("mean", "max", "sum"):
            both = [
                column_mass(q, k, reduce=reduce, threshold=threshold, group=group, lse=lse, form=form)
                for form in ("reference", "torch")
            ]
            assert_close(both[1], both[0])


def test_mass_sums_to_the_number_of_rows(generator, assert_close):
    q, k = inputs(generator, rows=20, length=50)
    assert_close(column_mass(q, k, group="none").sum(-1), torch.full((2, 6), 20.0))
    assert_close(column_mass(q, k, group="sum").sum(-1), torch.full((2, 2), 60.0))


def test_rows_in_two_blocks_add_up(generator, assert_close):
    q, k = inputs(generator, rows=63, length=63)
    first = column_mass(q[:, :, :40], k, q_start=0)
    second = column_mass(q[:, :, 40:], k, q_start=40)
    assert_close(first + second, column_mass(q, k))


def test_the_forward_pass_own_lse_gives_the_same(generator, assert_close):
    from memlens.attention.exact import attend

    q, k = inputs(generator)
    _, lse = attend(q, k, k, return_lse=True)
    assert_close(column_mass(q, k, lse=lse), column_mass(q, k))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return out


def test_extra_memory_is_linear_in_length(generator):
    q, k = inputs(generator, 1, 4, 2, 2048, 2048, 8)
    with Largest() as largest:
        column_mass(q, k, form="torch")
    assert largest.size <= score.TILE < q.shape[1] * 2048 * 2048 / 4


def test_a_row_of_equal_weights_is_on_neither_side_of_its_share():
    q, k = torch.zeros(1, 1, 7, 4), torch.randn(1, 1, 7, 4)
    for form in ("reference", "torch"):
        for reduce in ("count_above", "count_below"):
            assert int(column_mass(q, k, reduce=reduce, threshold="1/t", form=form).sum()) == 0


def test_half_precision_is_summed_in_float32(generator, assert_close):
    q, k = (x.half() for x in inputs(generator))
    got = column_mass(q, k)
    assert got.dtype == torch.float32
    assert_close(got, column_mass(q.float(), k.float()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce": "sums"}, "did you mean 'sum'"),
        ({"group": "average"}, "one of"),
        ({"q_start": 62}, "every row's own key"),
        ({"threshold": 0.1}, "a threshold for the counts"),
        ({"reduce": "count_above"}, "a threshold for the counts"),
        ({"reduce": "count_above", "threshold": "2/t"}, "a number or '1/t'"),
        ({"lse": torch.zeros(2, 6, 62)}, "lse has shape"),
        ({"alive": torch.ones(2, 5, dtype=torch.bool)}, "alive has shape"),
        ({"k": torch.zeros(2, 4, 63, 24)}, "no multiple of kv_heads"),
        ({"form": "cuda"}, "one of"),
    ],
)
def test_bad_calls_are_refused(change, message, generator):
    q, k = inputs(generator)
    with pytest.raises(ValueError, match=message):
        column_mass(q, change.pop("k", k), **change)


def test_triton_where_it_cannot_run_says_why(generator, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="form='triton' cannot run"):
        column_mass(*inputs(generator), form="triton")


def test_grouping_by_hand():
    x = torch.tensor([[[1.0, 5.0], [3.0, 1.0]]])
    assert group_heads(x, 1, "mean").tolist() == [[[2.0, 3.0]]]
    assert group_heads(x, 1, "max").tolist() == [[[3.0, 5.0]]]
    assert group_heads(x, 1, "sum").tolist() == [[[4.0, 6.0]]]


def test_smoothing_by_hand():
    row = torch.tensor([[0.0, 3.0, 0.0, 0.0, 6.0]])
    assert smooth(row, 3, "max").tolist() == [[3.0, 3.0, 3.0, 6.0, 6.0]]
    assert smooth(row, 3, "avg").tolist() == [[1.0, 1.0, 1.0, 2.0, 2.0]]  # zeros beyond the end count
    assert smooth(row, 1) is row
    with pytest.raises(ValueError, match="an odd kernel"):
        smooth(row, 4)


def test_surprisal_is_the_teacher_forced_nll(generator, assert_close):
    logits = torch.randn(2, 7, 11, generator=generator)
    ids = torch.randint(0, 11, (2, 7), generator=generator)
    got = surprisal(logits, ids)
    assert bool((got[:, 0] == torch.inf).all())
    want = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert_close(got[:, 1:], want)
    later = surprisal(logits[:, 3:], ids[:, 3:], prev_logits=logits[:, 2])
    assert_close(later, got[:, 3:])
    assert_close(
        surprisal(logits, ids, prev_logits=logits[:, 0])[:, 0], F.cross_entropy(logits[:, 0], ids[:, 0], reduction="none")
    )


def test_hits_and_retained_mass(generator):
    q, k = inputs(generator, rows=10, length=40)
    p = probabilities(q, k)
    everything = torch.arange(40).expand(2, 2, 40)
    assert bool((hit_rate(everything, p, 5) == 1).all())
    torch.testing.assert_close(retained_mass(everything, p), torch.ones(2, 2))
    best = group_heads(p.sum(2), 2, "sum").topk(5).indices
    assert bool((hit_rate(best, p, 5) == 1).all())
    assert bool((hit_rate(best[..., :2], p, 5) == 0.4).all())
    others = group_heads(p.sum(2), 2, "sum").topk(5, largest=False).indices
    assert bool((hit_rate(others, p, 5) == 0).all())
    assert bool((retained_mass(best, p) > retained_mass(others, p)).all())
    with pytest.raises(ValueError, match="top within"):
        hit_rate(best, p, 41)
