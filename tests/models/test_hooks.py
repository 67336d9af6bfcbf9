"""Hooks on a tiny random Llama with grouped queries: the model is unchanged by exact attention, and restored on exit."""

import pytest
import torch

from memlens.attention.exact import attend
from memlens.attention.rope import rope
from memlens.models.hooks import capture_qkv, gate_heads, rotary_frequencies, use_attention

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model(generator):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    made = transformers.LlamaForCausalLM(config).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    return made


@pytest.fixture
def ids(generator):
    return torch.randint(97, (2, 13), generator=generator)


def exact(layer, q, k, v, offset):
    return attend(q, k, v, q_offset=offset)


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("fn", [exact, lambda *args: None])
def test_exact_attention_changes_nothing(before, fn, model, ids, assert_close):
    model.set_attn_implementation(before)
    want = model(ids).logits
    with use_attention(model, fn):
        assert_close(model(ids).logits, want, atol=1e-4)
    assert model.config._attn_implementation == before


def test_a_cache_shifts_the_offset(model, ids, assert_close):
    want, seen = model(ids).logits, set()

    def fn(layer, q, k, v, offset):
        seen.add((layer, offset, q.shape[2], k.shape[2]))
        return attend(q, k, v, q_offset=offset)

    with use_attention(model, fn):
        first = model(ids[:, :8], use_cache=True)
        rest = model(ids[:, 8:], past_key_values=first.past_key_values).logits
    assert_close(torch.cat((first.logits, rest), 1), want, atol=1e-4)
    assert seen == {(layer, *call) for layer in range(3) for call in ((0, 8, 8), (8, 5, 13))}


def test_the_replacement_is_used_and_contexts_nest(model, ids):
    want, zero = model(ids).logits, lambda layer, q, k, v, offset: torch.zeros_like(q)
    with use_attention(model, zero):
        silent = model(ids).logits
        with use_attention(model, exact):
            assert not torch.equal(model(ids).logits, silent)
        assert torch.equal(model(ids).logits, silent)
    assert not torch.equal(silent, want)
    assert torch.equal(model(ids).logits, want)


def test_the_model_is_restored_after_an_exception(model, ids):
    want = model(ids).logits

    def broken(layer, q, k, v, offset):
        raise ArithmeticError(f"layer {layer}")

    with pytest.raises(ArithmeticError, match="layer 0"), use_attention(model, broken):
        model(ids)
    with pytest.raises(ArithmeticError), gate_heads(model, torch.zeros(3, 4)):
        raise ArithmeticError
    assert torch.equal(model(ids).logits, want)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_reach_the_weights(model, ids, assert_close):
    def gradient():
        return torch.autograd.grad(model(ids).logits.square().mean(), model.model.layers[0].self_attn.k_proj.weight)[0]

    want = gradient()
    with use_attention(model, exact):
        assert_close(gradient(), want, atol=1e-4)


def test_capture_before_and_after_rotation(model, ids, assert_close):
    after, before = capture_qkv(model, ids, layers=[2, 0]), capture_qkv(model, ids, layers=[2, 0], pre_rope=True)
    assert list(after) == [2, 0]
    assert after[0].q.shape == (2, 4, 13, 8)
    assert after[0].k.shape == after[0].v.shape == (2, 2, 13, 8)
    freq, pos = model.model.rotary_emb.inv_freq, torch.arange(13)
    for layer in (0, 2):
        assert_close(rope(before[layer].q, pos, freq), after[layer].q)
        assert_close(rope(before[layer].k, pos, freq), after[layer].k)
        assert_close(before[layer].v, after[layer].v)
    assert sorted(capture_qkv(model, ids)) == [0, 1, 2]
    # what was captured is what the model attends with
    out = attend(*after[0]).transpose(1, 2).flatten(-2)
    heard = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    model(ids)
    hook.remove()
    assert_close(out, heard[0], atol=1e-4)


def test_gates(model, ids, assert_close):
    want = model(ids).logits
    with gate_heads(model, torch.ones(3, 4)):
        assert torch.equal(model(ids).logits, want)
    gates = torch.ones(3, 4)
    gates[1, 2] = 0.0

    def without(layer, q, k, v, offset):
        out = attend(q, k, v, q_offset=offset)
        return torch.cat((out[:, :2], torch.zeros_like(out[:, 2:3]), out[:, 3:]), 1) if layer == 1 else out

    with use_attention(model, without):
        pruned = model(ids).logits
    with gate_heads(model, gates):
        assert_close(model(ids).logits, pruned, atol=1e-4)
    with gate_heads(model, gates, positions="last"):
        last = model(ids).logits
    assert_close(last[:, :-1], want[:, :-1])
    assert not torch.allclose(last[:, -1], want[:, -1])
    with gate_heads(model, gates, positions=torch.tensor([5])):
        some = model(ids).logits
    assert_close(some[:, :5], want[:, :5])
    assert not torch.allclose(some[:, 5], want[:, 5])


def test_the_gradient_of_a_gate_is_the_slope(model, ids):
    model.double()
    gates = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)

    def loss(values):
        with gate_heads(model, values):
            return model(ids).logits.log_softmax(-1)[0, -1, 7]

    (grad,) = torch.autograd.grad(loss(gates), gates)
    step = torch.zeros(3, 4, dtype=torch.float64)
    step[2, 1] = 1e-2  # the model normalises in float32
    slope = (loss(gates + step) - loss(gates - step)).item() / 2e-2
    assert grad[2, 1].item() == pytest.approx(slope, rel=1e-2)


def test_refusals(model, ids):
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with use_attention(model, exact), pytest.raises(ValueError, match=r"not plain causal; .*run them one by one, unpadded"):
        model(ids, attention_mask=padded)
    with (
        use_attention(model, lambda layer, q, *rest: q[:, :1]),
        pytest.raises(ValueError, match=r"fn returned \(2, 1, 13, 8\)"),
    ):
        model(ids)
    with (
        pytest.raises(ValueError, match=r"gates has shape \(4, 3\); expected \(layers=3, heads=4\)"),
        gate_heads(model, torch.ones(4, 3)),
    ):
        pass
    with pytest.raises(ValueError, match=r"one of '0', '1', '2'"):
        capture_qkv(model, ids, layers=[3])
    with pytest.raises(ValueError, match=r"Linear has 0 attention modules"), use_attention(torch.nn.Linear(2, 2), exact):
        pass


@pytest.mark.model
def test_smollm2_with_our_attention(smollm2):
    model, tokenizer = smollm2
    text = " ".join(f"The {n}th word is {n * n % 101}." for n in range(300))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
    assert ids.shape[1] == 1024
    with torch.no_grad():
        want = model(ids).logits
        with use_attention(model, exact):
            got = model(ids).logits
    assert (got - want).abs().max() <= 2e-4


def test_rotary_frequencies_are_the_models_or_none():
    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 40,
    }  # fmt: skip
    whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    wanted = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(rotary_frequencies(whole), wanted)
    partial = transformers.StableLmConfig(**sizes, partial_rotary_factor=0.5)
    assert rotary_frequencies(transformers.StableLmForCausalLM(partial)) is None
