"""The 8-bit Adam kernel in the interpreter, against the codec reference."""

import pytest
import torch

from memlens.optim import CodedMoments, Packed, adam_direction, coded_direction, dyn8
from memlens.optim.lowbit import _tables

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("interpreted")
SIZES = pytest.mark.parametrize("numel", [1, 63, 256, 257, 1000])
CODECS = (dyn8(True), dyn8(False))


def spread(numel, generator):
    """Gradients over six decades, some of them zero."""
    g = torch.randn(numel, generator=generator) * 10 ** (torch.rand(numel, generator=generator) * -6)
    g[::11] = 0
    return g


def codes_agree(got, want, share=0.01):
    """Rounding may move an element that lies on a border to the next code, and never further."""
    apart = (got.int() - want.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= share


@SIZES
@pytest.mark.parametrize("eps_mode", ["torch", "hf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_few_steps_give_the_reference(numel, eps_mode, dtype, generator, assert_close):
    want = None
    for step in range(3):
        g = spread(numel, generator).to(dtype)
        before = want
        kernel, got = coded_direction(g, before, *CODECS, (0.8, 0.95), 1e-6, eps_mode, form="triton")
        direction, want = coded_direction(g, before, *CODECS, (0.8, 0.95), 1e-6, eps_mode, form="reference")
        assert_close(kernel, direction)
        assert got.step == step + 1
        for part, other in ((got.m, want.m), (got.v, want.v)):
            codes_agree(part.codes, other.codes)
            assert_close(part.scale, other.scale, rtol=1e-6, atol=0.0)
            assert part.shape == (numel,)


@SIZES
def test_every_output_is_written_and_nothing_beside_it(numel, generator, assert_close):
    from memlens_kernels.adam8 import adam8, adam8_buffers

    g = spread(numel, generator)
    room = [
        torch.full((t.numel() + 300,), 77 if t.dtype == torch.uint8 else torch.nan).to(t.dtype) for t in adam8_buffers(g)
    ]
    sizes = [t.numel() for t in adam8_buffers(g)]
    out = tuple(t[:n] for t, n in zip(room, sizes, strict=True))
    zero = (torch.zeros(sizes[1], dtype=torch.uint8), torch.zeros(sizes[2]))
    tables = [_tables(signed, g.device)[:2] for signed in (True, False)]
    direction, *state = adam8(g, zero, zero, *tables, betas=(0.9, 0.999), correction=1.0, floor=1e-3, out=out)
    (m, v), want = (0.1 * g, 0.001 * g * g), 0.1 * g / (0.001 * g * g).sqrt().add(1e-3)
    assert_close(direction, want)
    assert_close(dyn8(True).decode(Packed(*state[:2], (numel,))), dyn8(True).decode(dyn8(True).encode(m)))
    assert_close(dyn8(False).decode(Packed(*state[2:], (numel,))), dyn8(False).decode(dyn8(False).encode(v)))
    for t, n in zip(room, sizes, strict=True):
        assert (t[n:] == 77).all() if t.dtype == torch.uint8 else t[n:].isnan().all()


def test_blocks_of_zeros_stay_zero_and_finite(generator):
    g = torch.zeros(600)
    g[300] = 2.0
    direction, st = coded_direction(g, None, *CODECS, form="triton")
    direction, st = coded_direction(g, st, *CODECS, form="triton")
    assert direction.isfinite().all()
    assert direction.nonzero().flatten().tolist() == [300]
    assert st.m.scale[0] == st.v.scale[2] == 0
    assert dyn8(True).decode(st.m).nonzero().flatten().tolist() == [300]


def test_it_walks_beside_float32_adam(generator):
    exact, coded, apart = None, None, []
    for _ in range(10):
        g = torch.randn(700, generator=generator) + 1
        want, exact = adam_direction(g, exact)
        got, coded = coded_direction(g, coded, *CODECS, form="triton")
        apart.append((got - want).norm() / want.norm())
    assert max(apart) < 0.03
    assert isinstance(coded, CodedMoments)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_is_refused_by_its_place(bad):
    g = torch.ones(400)
    g[399] = bad
    with pytest.raises(ValueError, match=r"g\[399\]"):
        coded_direction(g, None, *CODECS, form="triton")


def test_tiles_name_every_argument():
    from memlens_kernels.adam8 import BLOCK, adam8_kernel, tiles

    assert {tile.signature["g"] for tile in tiles()} == {"*fp32", "*fp16", "*bf16"}
    for tile in tiles():
        assert list(tile.signature) == list(adam8_kernel.arg_names)
        assert tile.constants == {"BLOCK": BLOCK}
