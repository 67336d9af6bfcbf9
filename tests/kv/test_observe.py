"""A decoding step that observes: against attention and column sums, and inside a model under the policies that use it."""

import kv_presets as presets
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memlens.attention.exact import attend
from memlens.kv import policies
from memlens.kv.cache import continue_with, prefill
from memlens.kv.observe import decode_observe
from memlens.kv.policies import h2o, tova
from memlens.kv.score import column_mass


def inputs(generator, batch=2, heads=6, kv_heads=2, length=37, dim=16, value_dim=24):
    q = torch.randn(batch, heads, 1, dim, generator=generator)
    return q, *(torch.randn(batch, kv_heads, length, d, generator=generator) for d in (dim, value_dim))


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("group", ["mean", "max", "sum", "none"])
@pytest.mark.parametrize("sizes", [{}, {"length": 1}, {"kv_heads": 6, "heads": 6}, {"kv_heads": 1, "length": 130}], ids=str)
def test_it_is_attention_and_its_column_sums(form, group, sizes, generator, assert_close):
    q, k, v = inputs(generator, **sizes)
    score = torch.rand(2, q.shape[1] if group == "none" else k.shape[1], k.shape[2], generator=generator)
    kept = score.clone()
    got = decode_observe(q, k, v, score, group=group, scale=0.3, form=form)
    assert_close(got[:2], attend(q, k, v, scale=0.3, return_lse=True))
    assert_close(got.score, kept + column_mass(q, k, group=group, scale=0.3))
    assert torch.equal(score, kept)
    assert_close(decode_observe(q, k, v, group="none", form=form).score.sum(-1), torch.ones(2, q.shape[1]))


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_keys_that_are_not_alive(form, generator, assert_close):
    q, k, v = inputs(generator)
    alive = (torch.arange(37) >= torch.tensor([[20], [37]]))[:, None].expand(2, 2, 37)  # the second row sees nothing
    got = decode_observe(q, k, v, alive=alive, form=form)
    want = decode_observe(q[:1], k[:1, :, 20:], v[:1, :, 20:], form="reference")
    assert_close((got.out[:1], got.lse[:1], got.score[:1, :, 20:]), tuple(want))
    assert not bool(got.score[~alive].any() | got.out[1].any())
    assert bool((got.lse[1] == -torch.inf).all())


def test_half_and_double_keep_their_dtype(generator, assert_close):
    given = inputs(generator)
    for dtype in (torch.float16, torch.float64):
        q, k, v = (x.to(dtype) for x in given)
        got = decode_observe(q, k, v)
        assert (got.out.dtype, got.score.dtype) == (dtype, torch.float32)
        assert_close(got.out, attend(q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 2, 16)}, "2 rows; expected the newest row alone"),
        ({"group": "average"}, "one of"),
        ({"score": torch.zeros(2, 6, 37)}, "score has shape"),
        ({"k": torch.zeros(2, 4, 37, 16), "v": torch.zeros(2, 4, 37, 8)}, "no multiple of kv_heads"),
        ({"alive": torch.ones(2, 2, 5, dtype=torch.bool)}, "alive has shape"),
        ({"k": torch.zeros(2, 2, 0, 16), "v": torch.zeros(2, 2, 0, 8)}, "k_len"),
        ({"form": "cuda"}, "one of"),
    ],
)
def test_bad_calls_are_refused(change, message, generator):
    given = dict(zip("qkv", inputs(generator), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        decode_observe(given.pop("q"), given.pop("k"), given.pop("v"), **given)


# --- inside a model -------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """How many products had a factor with this many tokens (all kv heads, any layout)."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.count = tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in ("bmm", "mm.", "matmul")):
            self.count += any(isinstance(x, torch.Tensor) and self.tokens in x.shape for x in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [h2o(10, 11), h2o(10, 11, group="max"), tova(21)], ids=["mean", "max", "tova"])
@torch.no_grad()
def test_a_step_scores_with_the_products_of_attention(policy, llama, monkeypatch, assert_close):
    ids, new = presets.prompt(30), presets.prompt(6, seed=5)
    runs = []
    for each in (policy, policy._replace(tallies=False)):
        cache = prefill(llama, ids, each).cache
        with Products(22) as products:  # 21 held and the new one
            logits = [continue_with(llama, cache, new[:, i : i + 1]) for i in range(6)]
        runs.append((torch.cat(logits, 1), [entry.stream.score for entry in cache.state], cache.positions(2)))
        # one product for the scores and one for the output; otherwise attention is one operator, and the scores are made again
        assert products.count == 6 * 3 * 2 if each.tallies else products.count >= 6 * 3
    assert_close(runs[0], runs[1])

    def refused(*args, **options):
        raise AssertionError("scores were computed a second time")

    cache = prefill(llama, ids, policy).cache
    monkeypatch.setattr(policies, "column_mass", refused)
    continue_with(llama, cache, new[:, :1])


@torch.no_grad()
def test_padding_and_turned_keys_change_nothing(llama, assert_close):
    ids, new = presets.prompt(30, rows=2), presets.prompt(1, rows=2, seed=5)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :7] = 0
    for policy in (h2o(10, 11), h2o(10, 11, rolling=True)):
        one, two = (prefill(llama, ids, p, mask=mask).cache for p in (policy, policy._replace(tallies=False)))
        longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
        got, want = (continue_with(llama, cache, new[:, :1], mask=longer) for cache in (one, two))
        assert_close(got, want)
        assert_close([e.stream.score for e in one.state], [e.stream.score for e in two.state])
