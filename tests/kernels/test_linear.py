"""The linear-attention kernels in the interpreter, against the reference; outputs start as NaN, sizes fit no tile."""

import sys
from pathlib import Path

import pytest
import torch

from memlens.memory.based import taylor_attention
from memlens.memory.linear import CHANNEL_KEY, KERNEL_KEY, LinearState, linear_attention

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))
from memory_cases import VARIANTS, call, inputs, results

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_give_the_reference_forward_and_backward(variant, length, generator, assert_close):
    leaves, options = inputs(variant, length, generator=generator, key_dim=20, value_dim=21, batch=1)
    want = results(linear_attention, leaves, options, form="reference")
    assert_close(results(linear_attention, leaves, options, form="triton"), want, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("variant", ["decay", "channel", "channel delta"])
def test_a_decay_that_forgets_everything(variant, generator, assert_close):
    leaves, options = inputs(variant, 33, generator=generator, batch=1, heads=2, kv_heads=1, strong=True)
    want = results(linear_attention, leaves, options, form="reference")
    assert_close(results(linear_attention, leaves, options, form="triton"), want, rtol=1e-4, atol=5e-5)


def test_a_head_reads_the_group_it_belongs_to(generator, assert_close):
    """Queries and values with fewer heads than the keys, a batch of two."""
    q, k, v = (torch.randn(2, heads, 19, 8, generator=generator) for heads in (2, 6, 3))
    want = linear_attention(q, k, v, form="reference")
    got = linear_attention(q, k, v, form="triton")
    assert_close((got[0], got[1].S), (want[0], want[1].S))


@pytest.mark.parametrize("variant", ["decay", "channel", "delta"])
def test_half_precision_is_as_good_as_torch_in_half(variant, generator):
    leaves, options = inputs(variant, 40, generator=generator, dtype=torch.float16, batch=1)
    exact = call(linear_attention, {name: x.double() for name, x in leaves.items()}, options, form="reference")[0]
    errors = {}
    for form in ("torch", "triton"):
        out = call(linear_attention, leaves, options, form=form)[0]
        assert out.dtype == torch.float16
        errors[form] = (out.double() - exact).abs().max().item()
    # the kernel rounds the operands of each product to float16, torch only the inputs and the output
    assert errors["triton"] < 4 * errors["torch"]


def test_only_key_dims_that_fit_are_taken():
    wide = torch.zeros(1, 1, 4, 160)
    with pytest.raises(ValueError, match=f"key_dim=160 with form='triton'; expected at most {KERNEL_KEY}"):
        linear_attention(wide, wide, wide, form="triton")
    wide = wide[..., :80]
    with pytest.raises(ValueError, match=f"key_dim=80 with form='triton'; expected at most {CHANNEL_KEY}"):
        linear_attention(wide, wide, wide, log_decay=-wide, form="triton")


def test_wide_keys_in_float32_with_a_decay_per_channel_are_refused():
    from memlens_kernels.linear import plan

    with pytest.raises(
        ValueError, match=r"key_dim=65 in torch.float32 with a decay per channel; .* at most 64; use form='torch'"
    ):
        plan(65, 65, channel=True, dtype=torch.float32)
    assert plan(128, 128, channel=True, dtype=torch.bfloat16).chunk == 16
    assert plan(128, 128, channel=False, dtype=torch.float32).warps == 8


def from_state(q, k, v, *, state, form):
    return taylor_attention(q, k, v, state=state, form=form)


@pytest.mark.parametrize("length, dim", [(1, 16), (37, 5)])
def test_the_taylor_kernel_gives_the_reference(length, dim, generator, assert_close):
    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    before = taylor_attention(draw(1, 4, 3, dim), draw(1, 4, 3, dim), draw(1, 4, 3, 18))[1]
    leaves = {
        "q": draw(1, 4, length, dim),
        "k": draw(1, 2, length, dim),
        "v": draw(1, 2, length, 18),
        "S": before.S,
        "z": before.z,
    }
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    want, got = (results(from_state, leaves, {}, form=form) for form in ("reference", "triton"))
    assert_close(got, want, rtol=1e-4, atol=5e-5)


def test_the_state_of_one_form_goes_on_in_another(generator, assert_close):
    q, k, v = (torch.randn(1, 2, 30, 6, generator=generator) for _ in range(3))
    want, last = taylor_attention(q, k, v, form="reference")
    parts, state = [], None
    for form, part in zip(("triton", "torch", "triton"), (slice(0, 7), slice(7, 20), slice(20, 30)), strict=True):
        out, state = taylor_attention(q[:, :, part], k[:, :, part], v[:, :, part], state=state, form=form)
        assert isinstance(state, LinearState)
        parts.append(out)
    assert_close((torch.cat(parts, 2), *state), (want, *last))


def test_every_tile_is_named_apart():
    from memlens_kernels import linear, taylor

    made = linear.tiles() + taylor.tiles()
    labels = [(tile.kernel.__name__, tile.label, target) for tile in made for target in tile.targets]
    assert len(set(labels)) == len(labels)
    for tile in made:
        assert set(tile.signature) == set(tile.kernel.arg_names)
        assert min(tile.flops, tile.bytes) > 0
