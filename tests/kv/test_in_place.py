"""Decoding on packed storage: what the copying path gives, without a floating copy of a layer's cache."""

import kv_presets as presets
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memlens.attention.exact import attend
from memlens.kv import packed
from memlens.kv.cache import continue_with, prefill
from memlens.kv.kivi import kivi, kivi_attend
from memlens.kv.mikv import mixed
from memlens.kv.policies import Policy, full, h2o, nothing, random_keep, sirllm, snapkv, streaming, tova
from memlens.kv.score import column_mass
from memlens.kv.select import extend
from memlens.kv.store import HeldLayer


def by_key(state, block):
    return state._replace(stream=extend(state.stream, nothing(block), pad=block.pad)._replace(score=-block.k.norm(dim=-1)))


FORMATS = {
    "kivi2": kivi(2, group=8, residual=16), "kivi4": kivi(4, group=8, residual=32), "as it is": kivi(16),
    "per token": kivi(4, group=8, residual=16, axes=(-1, -1)), "mikv": mixed(0.3, hi=8, lo=4, group=8),
}  # fmt: skip
POLICIES = {
    "full": full, "streaming": lambda: streaming(48, sinks=2), "snapkv": lambda: snapkv(48, window=5, kernel=3),
    "random": lambda: random_keep(48, generator=presets.generator(), sinks=2),
    "sirllm": lambda: sirllm(start=2, entropy=38, recent=8, decay=0.9),
    "rolling": lambda: sirllm(start=2, entropy=38, recent=8, decay=0.9, rolling=True),
    "h2o": lambda: h2o(24, 24), "tova": lambda: tova(48), "keys": lambda: Policy("keys", by_key, 48),
}  # fmt: skip


def runs(model, policy, store, ids, parts, mask=None):
    """(logits, what each layer holds) in place, then by way of a copy; and the caches."""
    results, caches = [], []
    for each in (store, store._replace(in_place=False)):
        cache = prefill(model, ids, policy().stored(each), mask=mask).cache
        logits, longer = [], mask
        for part in parts:
            longer = None if mask is None else torch.cat((longer, torch.ones_like(part)), 1)
            logits.append(continue_with(model, cache, part, mask=longer))
        held = [layer.store.read(layer.stored, torch.float32) for layer in cache.layers]
        results.append((torch.cat(logits, 1), held))
        caches.append(cache)
    return results, caches


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_it_writes_what_the_copying_path_writes(policy, form, model, assert_close, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 32)  # several blocks even here
    if FORMATS[form].problem(POLICIES[policy]()):
        pytest.skip("a pair that is refused")
    # before a new token is rounded: from there on 1e-7 in a key may be a step of its code
    parts = presets.prompt(12, seed=5).split([1, 1, 5, 1, 1, 1, 1, 1], 1)
    (got, want), caches = runs(model, POLICIES[policy], FORMATS[form], presets.prompt(96), parts)
    assert_close(got, want)
    for cache in caches:
        assert [layer.keys for layer in cache.layers] == [None] * 3
        assert cache.held == caches[0].held
        assert cache.nbytes() == caches[0].nbytes()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("evict", [False, True])
@torch.no_grad()
def test_a_layer_attends_alike_through_every_flush(form, evict, generator, assert_close, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 32)
    store, sizes = FORMATS[form], [50, 1, 1, 5, *[1] * 40, 24, 1, 1]
    layers = [HeldLayer(each) for each in (store, store._replace(in_place=False))]
    for n in sizes:
        q, k, v = (torch.randn(2, heads, n, 16, generator=generator) for heads in (4, 2, 2))
        outs = []
        for layer in layers:
            held = layer.update(k, v)
            layer.observe(q)
            outs.append(layer.attend(q, *held, mask=None, bias=None, scale=None)[:2])
        assert_close(outs[0], outs[1])
        length = layers[0].held
        score, idx = torch.rand(2, 2, length, generator=generator), None
        if evict and length > 40:
            idx = score.topk(40, -1).indices.sort(-1).values
            score = score.gather(-1, idx)
        for layer in layers:
            layer.settle(idx, score)
        assert layers[0].held == layers[1].held == (40 if idx is not None else length)
        assert_close(*(each.store.read(each.stored, torch.float32) for each in layers), rtol=0, atol=0)


@torch.no_grad()
def test_a_padded_batch(llama, assert_close):
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, :13] = 0
    ids, parts = presets.prompt(64, rows=2), presets.prompt(5, rows=2, seed=5).split(1, 1)
    for policy in ("full", "snapkv"):
        (got, want), _ = runs(llama, POLICIES[policy], FORMATS["kivi4"], ids, parts, mask)
        assert_close(got, want)


@torch.no_grad()
def test_who_reads_keys_still_gets_them(llama, monkeypatch):
    """A score that looks at keys is never shown the stand-ins, and one that does not never has a layer dequantised."""
    reads = []
    real = HeldLayer.whole
    monkeypatch.setattr(HeldLayer, "whole", lambda self: reads.append(self.apart) or real(self))
    tallied = {"h2o": (0, 3), "tova": (0, 3)}  # a row's probabilities come from attention itself, several rows' do not
    silent, looking = dict.fromkeys(("streaming", "full", "snapkv"), (0, 0)), dict.fromkeys(("rolling", "keys"), (3, 3))
    for name, expected in (silent | tallied | looking).items():
        for store in ("kivi4", "mikv"):
            if FORMATS[store].problem(POLICIES[name]()):
                continue
            cache = prefill(llama, presets.prompt(90), POLICIES[name]().stored(FORMATS[store])).cache
            for rows, many in zip((1, 2), expected, strict=True):
                reads.clear()
                continue_with(llama, cache, presets.prompt(rows, seed=5))
                assert sum(reads) == many, (name, store, rows)


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("store", FORMATS)
@pytest.mark.parametrize("holes", [False, True])
def test_what_each_token_got_is_its_column_of_the_softmax(store, form, holes, generator, assert_close, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 32)
    k, v = (torch.randn(2, 2, 77, 16, generator=generator) for _ in "kv")
    q, fmt = torch.randn(2, 4, 1, 16, generator=generator), FORMATS[store]
    seen = {"score": torch.rand(2, 2, 76, generator=generator), "query_peak": q.abs().amax(2)[:, :2]}
    held = fmt.commit(None, k[:, :, :76], v[:, :, :76], **seen)
    idx = torch.rand(2, 2, 77, generator=generator).topk(60, -1).indices.sort(-1).values if holes else None
    score = torch.rand(2, 2, 60 if holes else 77, generator=generator)
    held = fmt.commit(held, k[:, :, 76:], v[:, :, 76:], idx, score=score)
    got = fmt.attend(q, held, scale=0.3, form=form, tally=True)
    keys, values = fmt.read(held, torch.float32)
    assert_close(got[:2], attend(q, keys, values, causal=False, scale=0.3, return_lse=True, form="reference"))
    assert_close(got.score, column_mass(q, keys, group="none", scale=0.3, form="reference"))
    assert_close(got.score.sum(-1), torch.ones(2, 4))


def test_several_rows_are_not_tallied(generator):
    k, v = (torch.randn(1, 2, 64, 16, generator=generator) for _ in "kv")
    held = kivi(4, group=8, residual=16).commit(None, k, v)
    with pytest.raises(ValueError, match="2 rows to tally.*a single row"):
        kivi_attend(torch.randn(1, 4, 2, 16, generator=generator), held, tally=True)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and 0 not in x.stride():
                self.size = max(self.size, x.numel() * x.element_size())
        return out


@pytest.mark.parametrize("length", [4096, 4133])
@torch.no_grad()
def test_no_floating_copy_of_the_layer_is_made(length, generator, assert_close):
    k, v, new = (torch.randn(1, 3, n, 64, generator=generator) for n in (length, length, 1))
    q = torch.randn(1, 9, 1, 64, generator=generator)
    sizes, outs = [], []
    for store in (kivi(4), kivi(4)._replace(in_place=False)):
        layer = HeldLayer(store)
        layer.update(k, v)
        layer.settle(None, torch.zeros(1, 3, length))
        with Largest() as largest:
            keys, values = layer.update(new, new)
            outs.append(layer.attend(q, keys, values, mask=None, bias=None, scale=None)[:2])
            layer.settle(None, torch.zeros(1, 3, layer.held))
        sizes.append(largest.size)
    assert_close(outs[0], outs[1])
    floating = 3 * length * 64 * 4  # of the keys, or of the values
    assert sizes[0] <= floating / 7 < floating <= sizes[1]
