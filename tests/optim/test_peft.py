"""Low-rank adapters: the sum by hand, off means off bit for bit, the base's prompt, files."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlens.kv.cache import continue_with, prefill
from memlens.optim.peft import (
    Adapter,
    Pair,
    load_adapter,
    lora,
    lora_init,
    lowrank_delta,
    response_mask,
    save_adapter,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, vocab_size=61)).eval()


@pytest.fixture
def adapter(model, generator):
    fresh = lora_init(model, rank=4, alpha=8.0, generator=generator)
    pairs = {n: Pair(p.a, torch.randn(p.b.shape, generator=generator)) for n, p in fresh.pairs.items()}
    return Adapter(pairs, fresh.scale)


@pytest.fixture
def ids(generator):
    return torch.randint(1, 61, (2, 9), generator=generator)


def test_the_delta_is_the_product_of_the_factors(generator, assert_close):
    x, a, b, s = (torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (4, 8), (6, 4), (4, 4)))
    assert_close(lowrank_delta(x, a, b, scale=2.0), 2 * x @ (b @ a).T)
    assert_close(lowrank_delta(x, a, b, s), x @ (b @ s @ a).T)
    with pytest.raises(ValueError, match="lowrank_delta"):
        lowrank_delta(x, a.T, b)


def test_it_equals_a_model_with_changed_weights(model, adapter, ids, assert_close):
    with torch.no_grad():
        with lora(model, adapter):
            got = model(ids).logits
        for name, pair in adapter.pairs.items():
            model.get_submodule(name).weight += adapter.scale * pair.b @ pair.a
        assert_close(got, model(ids).logits, atol=1e-4)


def test_off_is_the_base_bit_for_bit(model, adapter, ids, generator):
    with torch.no_grad():
        base = model(ids).logits
        with lora(model, adapter, mask=torch.zeros(2, 9, dtype=torch.bool)):
            assert torch.equal(model(ids).logits, base)
        with lora(model, lora_init(model, rank=4, alpha=8.0, generator=generator)):
            assert torch.equal(model(ids).logits, base)  # b = 0
        with lora(model, adapter):
            assert not torch.allclose(model(ids).logits, base)
        assert torch.equal(model(ids).logits, base)  # nothing is left behind
        with pytest.raises(RuntimeError, match="inside"), lora(model, adapter):
            raise RuntimeError("inside")
        assert torch.equal(model(ids).logits, base)


def test_a_masked_prompt_has_the_bases_keys_and_the_rest_can_go_on_from_them(model, adapter, ids, assert_close):
    one, split = ids[:1], 6
    with lora(model, adapter, mask=response_mask(torch.tensor([split]), 9)):
        whole = prefill(model, one)
    plain, base = prefill(model, one).cache, prefill(model, one[:, : split - 1]).cache
    for layer, got, never in zip(base.layers, whole.cache.layers, plain.layers, strict=True):
        assert torch.equal(got.keys[:, :, : split - 1], never.keys[:, :, : split - 1])
        assert_close(got.keys[:, :, : split - 1], layer.keys)
        assert not torch.allclose(got.keys[:, :, split - 1 :], never.keys[:, :, split - 1 :])
    with lora(model, adapter):
        got = continue_with(model, base.fork(), one[:, split - 1 :])[:, -1]
    assert_close(got, whole.logits, atol=1e-4)


def test_the_gradient_of_a_masked_token_is_zero(model, ids, generator):
    adapter = lora_init(model, rank=2, alpha=2.0, generator=generator)
    with lora(model, adapter, mask=torch.zeros(2, 9, dtype=torch.bool)):
        model(ids).logits.sum().backward()
    assert all(float(x.grad.abs().max()) == 0 for x in adapter.parameters)
    with lora(model, adapter):
        model(ids).logits.square().sum().backward()
    assert all(float(pair.b.grad.abs().max()) > 0 for pair in adapter.pairs.values())


def test_the_last_prompt_token_is_on():
    assert response_mask(torch.tensor([1, 3]), 4).tolist() == [[True] * 4, [False, False, True, True]]
    with pytest.raises(ValueError, match="prompt"):
        response_mask(torch.tensor([0]), 4)


def test_every_linear_layer_but_the_head(model, generator):
    adapter = lora_init(model, rank=4, alpha=8.0, generator=generator)
    assert len(adapter.pairs) == 14
    assert adapter.numel == 2 * 4 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 48))
    assert adapter.scale == 2.0


def test_a_file_gives_back_the_adapter_in_half_the_bytes(adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path)
    again = load_adapter(path)
    assert again.scale == adapter.scale
    assert set(again.pairs) == set(adapter.pairs)
    for name, pair in adapter.pairs.items():
        assert torch.equal(again.pairs[name].b, pair.b.bfloat16().float())
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == 2 * adapter.numel
    torch_file = tmp_path / "b.safetensors"
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, torch_file)
    with pytest.raises(ValueError, match="load_adapter"):
        load_adapter(torch_file)


def test_what_does_not_fit_is_refused(model, adapter, ids):
    with pytest.raises(ValueError, match="mask"), lora(model, adapter, mask=torch.ones(2, 9)):
        pass
    with pytest.raises(ValueError, match="one entry for each token"), lora(model, adapter, mask=torch.ones(2, 8) > 0):
        model(ids)
    with (
        pytest.raises(KeyError, match="made for another"),
        lora(model, Adapter({"none": next(iter(adapter.pairs.values()))}, 1.0)),
    ):
        pass
    with pytest.raises(ValueError, match="rank"):
        lora_init(model, rank=0, alpha=1.0, generator=torch.Generator())
