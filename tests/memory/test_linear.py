"""Linear attention: the reference against a quadratic form, autograd and cases by hand; the chunked form against the reference."""

import pytest
import torch
from memory_cases import VARIANTS, call, inputs, results

from memlens.memory.linear import (
    AffineState,
    LinearState,
    affine_of,
    compose,
    linear_attention,
    linear_attention_step,
    state_of,
)  # fmt: skip


def quadratic(q, k, v, log_decay, state, *, scale, normalize, eps=1e-12):
    """All pairs at once in float64, decays by differences of running sums: not how the library does it."""
    q, k, v, S = (x.double() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), state.S))
    G = torch.zeros_like(q) if log_decay is None else log_decay.double().cumsum(2)
    G = G if G.ndim == 4 else G[..., None]
    between = (G[:, :, :, None] - G[:, :, None]).exp()
    weight = (scale * (q[:, :, :, None] * k[:, :, None] * between).sum(-1)).tril()
    past = scale * q * G.exp()
    out = weight @ v + past @ S
    return out / (weight.sum(-1) + (past @ state.z.double()[..., None])[..., 0] + eps)[..., None] if normalize else out


@pytest.mark.parametrize("variant", ["plain", "decay", "channel", "normalized"])
def test_the_reference_is_the_quadratic_form_and_its_autograd(variant, generator, assert_close):
    leaves, options = inputs(variant, 9, generator=generator, dtype=torch.float64)
    got, _ = call(linear_attention, leaves, options, form="reference")
    state = LinearState(leaves["S"], leaves.get("z"))
    want = quadratic(
        leaves["q"], leaves["k"], leaves["v"], leaves.get("log_decay"), state, scale=0.5, normalize=options["normalize"]
    )
    assert_close(got, want)
    push = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    assert_close(*(torch.autograd.grad((x * push).sum(), list(leaves.values()), retain_graph=True) for x in (got, want)))


@pytest.mark.parametrize("length", [1, 63, 130])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_give_the_reference_forward_and_backward(variant, length, generator, assert_close):
    leaves, options = inputs(variant, length, generator=generator)
    want = results(linear_attention, leaves, options, form="reference")
    got = results(linear_attention, leaves, options, form="torch", chunk=32)
    assert_close(got, want, rtol=1e-4, atol=1e-4 if length > 100 else 2e-5)


@pytest.mark.parametrize("chunk", [1, 8, 128])
@pytest.mark.parametrize("variant", ["channel", "gated delta"])
def test_the_chunk_changes_nothing(variant, chunk, generator, assert_close):
    leaves, options = inputs(variant, 37, generator=generator, dtype=torch.float64)
    assert_close(
        call(linear_attention, leaves, options, chunk=chunk)[0],
        call(linear_attention, leaves, options, form="reference")[0],
    )


@pytest.mark.parametrize("variant", ["decay", "channel", "gated delta", "channel delta"])
def test_a_decay_that_forgets_everything_stays_finite_and_exact(variant, generator, assert_close):
    leaves, options = inputs(variant, 64, generator=generator, strong=True)
    assert leaves["log_decay"].min() < -10_000
    want, got = (results(linear_attention, leaves, options, form=form) for form in ("reference", "torch"))
    assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("at", [1, 13, 32, 69])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sequence_split_anywhere_gives_the_unsplit_answer(variant, at, generator, assert_close):
    leaves, options = inputs(variant, 70, generator=generator)
    named = {name: x for name, x in leaves.items() if name in ("log_decay", "beta")}
    cut = {name: x.split((at, 70 - at), dim=2) for name, x in {**{n: leaves[n] for n in "qkv"}, **named}.items()}
    whole = call(linear_attention, leaves, options, chunk=32)
    state, parts = LinearState(leaves["S"], leaves.get("z")), []
    for i in range(2):
        piece = {name: x[i] for name, x in cut.items()}
        out, state = linear_attention(**piece, state=state, chunk=32, **options)
        parts.append(out)
    assert_close((torch.cat(parts, 2), *state), (whole[0], *whole[1]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_give_the_sequence(variant, generator, assert_close):
    leaves, options = inputs(variant, 5, generator=generator)
    want = call(linear_attention, leaves, options, form="torch")
    state, outs = LinearState(leaves["S"], leaves.get("z")), []
    for t in range(5):
        token = {name: x[:, :, t] for name, x in leaves.items() if name not in ("S", "z")}
        out, state = linear_attention_step(**token, state=state, **options)
        outs.append(out)
    assert_close((torch.stack(outs, 2), *state), (want[0], *want[1]))


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_the_delta_rule_reads_back_what_it_wrote(form, generator, assert_close):
    k = torch.nn.functional.normalize(torch.randn(1, 2, 40, 8, generator=generator), dim=-1)
    v = torch.randn(1, 2, 40, 6, generator=generator)
    out, state = linear_attention(k, k, v, beta=torch.ones(1, 2, 40), rule="delta", form=form, chunk=16)
    assert_close(out, v)  # beta = 1 and unit keys: the newest value of every key is there exactly
    same = k[:, :, :1].expand_as(k)
    _, state = linear_attention(same, same, v, beta=torch.ones(1, 2, 40), rule="delta", form=form)
    assert_close(state.S, k[:, :, 0, :, None] * v[:, :, -1, None])  # one key: only the last value is left


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_masked_token_was_never_there(variant, form, generator, assert_close):
    leaves, options = inputs(variant, 40, generator=generator)
    mask = torch.rand(1, 40, generator=generator) > 0.4
    dirty = {
        name: x.detach().clone().masked_fill(~mask[:, None, :, None], torch.nan) if name in "qkv" else x
        for name, x in leaves.items()
    }
    got, state = call(linear_attention, dirty, options, form=form, mask=mask.expand(2, -1), chunk=16)
    kept = {name: x if name in ("S", "z") else x[:, :, mask[0]] for name, x in leaves.items()}
    want, last = call(linear_attention, kept, options, form=form, chunk=16)
    assert_close((got[:, :, mask[0]], *state), (want, *last))
    assert not got[:, :, ~mask[0]].any()


def test_state_of_is_the_state_without_an_order(generator, assert_close):
    leaves, _ = inputs("plain", 17, generator=generator, kv_heads=4)
    mask = torch.rand(2, 17, generator=generator) > 0.3
    _, want = linear_attention(leaves["q"], leaves["k"], leaves["v"], normalize=True, mask=mask)
    assert_close(tuple(state_of(leaves["k"], leaves["v"], mask=mask, normalize=True)), tuple(want))


@pytest.mark.parametrize("variant", ["plain", "decay", "channel", "delta", "channel delta"])
def test_stretches_compose_in_any_tree(variant, generator, assert_close):
    leaves, options = inputs(variant, 24, generator=generator, dtype=torch.float64, kv_heads=4)
    gates = {name: leaves[name] for name in ("log_decay", "beta") if name in leaves}
    cut = {name: x.split(8, dim=2) for name, x in {"k": leaves["k"], "v": leaves["v"], **gates}.items()}
    a, b, c = (affine_of(**{name: x[i] for name, x in cut.items()}, rule=options["rule"]) for i in range(3))
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    assert_close(tuple(left), tuple(right))
    last = call(linear_attention, leaves, options, form="reference")[1].S
    L = left.L if left.L.ndim == 4 else torch.diag_embed(left.L.reshape(2, 4, -1).expand(2, 4, 12))
    assert_close(L @ leaves["S"] + left.M, last)


def test_stretches_of_different_kinds_compose(generator, assert_close):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def dense(x):
        return x if x.ndim == 4 else torch.diag_embed(x.reshape(2, 3, -1).expand(2, 3, 4))

    kinds = [AffineState(draw(2, 3, *tail), draw(2, 3, 4, 5)) for tail in ((), (4,), (4, 4))]
    for first in kinds:
        for then in kinds:
            got = compose(first, then)
            assert_close(dense(got.L), dense(then.L) @ dense(first.L))
            assert_close(got.M, dense(then.L) @ first.M + then.M)
    with pytest.raises(ValueError, match="compose: then has L"):
        compose(kinds[0], AffineState(draw(2, 4), draw(2, 3, 4, 5)))


def test_the_state_stays_float32_and_out_keeps_its_dtype(generator):
    leaves, options = inputs("decay", 70, generator=generator, dtype=torch.bfloat16)
    out, state = call(linear_attention, leaves, options)
    exact = {name: x.double() for name, x in leaves.items()}
    want, _ = call(linear_attention, exact, options, form="reference")
    assert out.dtype == torch.bfloat16
    assert state.S.dtype == torch.float32
    assert (out.double() - want).abs().max() < 2**-8 * want.abs().max()


REFUSED = {
    "log_decay": ({"log_decay": torch.full((1, 2, 5), 0.1)}, "log_decay"),
    "nan decay": ({"log_decay": torch.full((1, 2, 5), torch.nan)}, r"log_decay\[0, 0, 0\] is nan"),
    "infinite decay": ({"log_decay": torch.full((1, 2, 5), -torch.inf)}, "log_decay"),
    "decay shape": ({"log_decay": torch.zeros(1, 2, 4)}, "log_decay has shape"),
    "beta": ({"beta": torch.full((1, 2, 5), 1.5), "rule": "delta"}, "beta=1.5"),
    "beta without delta": ({"beta": torch.ones(1, 2, 5)}, "with beta"),
    "delta without beta": ({"rule": "delta"}, "without beta"),
    "normalized delta": ({"rule": "delta", "beta": torch.ones(1, 2, 5), "normalize": True}, "normalize with rule='delta'"),
    "rule": ({"rule": "dleta"}, "did you mean 'delta'"),
    "state shape": ({"state": LinearState(torch.zeros(1, 2, 4, 4))}, r"state.S is \(1, 2, 4, 4\)"),
    "state dtype": ({"state": LinearState(torch.zeros(1, 2, 4, 3).half())}, "float16"),
    "state z": ({"state": LinearState(torch.zeros(1, 2, 4, 3)), "normalize": True}, "without z"),
    "mask": ({"mask": torch.ones(1, 5)}, "mask is torch.float32"),
    "chunk": ({"chunk": 24}, "chunk=24"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_by_name(case):
    options, message = REFUSED[case]
    q, v = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 3)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, q, v, **options)


def test_wrong_shapes_are_refused():
    q, v = torch.zeros(1, 4, 5, 4), torch.zeros(1, 4, 5, 3)
    with pytest.raises(ValueError, match="no multiple of k_heads"):
        linear_attention(q, q[:, :3], v)
    with pytest.raises(ValueError, match="length=0"):
        linear_attention(q[:, :, :0], q[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match="mixed dtypes"):
        linear_attention(q, q.half(), v)
