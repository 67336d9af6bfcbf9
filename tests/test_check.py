"""The argument checks: what passes, what is refused, and the words it is refused with."""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch

from memlens import check, layout

QUERY, KEYS = "batch heads q_len dim", "batch kv_heads k_len dim"


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def test_shapes_returns_the_sizes():
    sizes = check.shapes("op", q=(zeros(2, 4, 5, 8), QUERY), k=(zeros(2, 1, 7, 8), KEYS), mask=(None, "q_len k_len"))
    assert sizes == {"batch": 2, "heads": 4, "q_len": 5, "dim": 8, "kv_heads": 1, "k_len": 7}


def test_shapes_takes_numbers_and_leading_axes():
    assert check.shapes("op", w=(zeros(3, 4), "3 cols"), x=(zeros(9, 9, 4), "... cols"), s=(zeros(), "")) == {"cols": 4}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {"q": (zeros(2, 4, 5, 8), QUERY), "k": (zeros(1, 3, 5, 8), KEYS)},
            r"^attend: k has shape \(1, 3, 5, 8\); expected \(batch=2, kv_heads, k_len, dim=8\); "
            r"all arguments: q \(2, 4, 5, 8\), k \(1, 3, 5, 8\)$",
        ),
        ({"q": (zeros(4, 5, 8), QUERY)}, r"attend: q has shape \(4, 5, 8\); expected \(batch, heads, q_len, dim\)"),
        ({"w": (zeros(2, 4), "3 cols")}, r"w has shape \(2, 4\); expected \(3, cols\)"),
        ({"x": (zeros(4), "... rows cols")}, r"x has shape \(4,\); expected \(\.\.\., rows, cols\)"),
        ({"x": (zeros(2, 4), "... cols"), "y": (zeros(5), "cols")}, r"y has shape \(5,\); expected \(cols=4\)"),
    ],
)
def test_shapes_names_the_tensor_and_all_the_others(tensors, says):
    with pytest.raises(ValueError, match=says):
        check.shapes("attend", **tensors)


def test_shapes_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"op: k is list; expected a tensor \(rows\)"):
        check.shapes("op", k=([1, 2], "rows"))


def three() -> dict:
    return {"q": (zeros(1, 9, 64, 64), QUERY), "k": (zeros(1, 3, 64, 64), KEYS), "v": (zeros(1, 3, 64, 64), KEYS)}


def test_shapes_takes_microseconds():
    tensors, seconds = three(), []
    for _ in range(2_000):
        start = time.perf_counter()
        check.shapes("attend", **tensors)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 20e-6


def test_shapes_looks_at_the_shape_alone():
    like = {name: (SimpleNamespace(shape=tensor.shape), spec) for name, (tensor, spec) in three().items()}
    assert check.shapes("attend", **like) == check.shapes("attend", **three())


def test_divides():
    check.divides("op", kv_heads=3, heads=9)
    with pytest.raises(ValueError, match=r"op: heads=9 is no multiple of kv_heads=2; expected kv_heads to divide heads"):
        check.divides("op", kv_heads=2, heads=9)
    with pytest.raises(ValueError, match="heads=9 is no multiple of kv_heads=0"):
        check.divides("op", kv_heads=0, heads=9)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_finite_names_the_first_bad_place(value):
    x = zeros(2, 3)
    x[1, 2] = float(value)
    with pytest.raises(ValueError, match=rf"op: x\[1, 2\] is {value}; expected finite numbers"):
        check.finite("op", y=torch.ones(2), x=x)


def test_finite_is_not_fooled():
    check.finite("op", none=None, ints=torch.arange(3), empty=zeros(0), sums_over=torch.full((9,), 3e38))
    with pytest.raises(ValueError, match=r"x\[0\] is inf"):
        check.finite("op", x=torch.tensor([float("inf"), -float("inf")]))
    with pytest.raises(ValueError, match=r"x\[1\] is nan"):
        check.finite("op", x=torch.tensor([1.0, float("nan")], dtype=torch.bfloat16))


def test_within():
    check.within("op", 0, 1, x=torch.tensor([0.0, 1.0]), y=0.5, none=None, empty=zeros(0))
    with pytest.raises(ValueError, match=r"op: rate=1\.5; expected rate within \[0, 1\]"):
        check.within("op", 0, 1, rate=1.5)
    with pytest.raises(ValueError, match=r"beta spans -0\.5 to 0\.25; expected beta within \[0, 1\]"):
        check.within("op", 0, 1, beta=torch.tensor([0.25, -0.5]))
    for nan in (float("nan"), torch.tensor([0.5, float("nan")])):
        with pytest.raises(ValueError, match="nan; expected x within"):
            check.within("op", 0, 1, x=nan)


def test_at_least():
    check.at_least("op", 1, steps=1)
    with pytest.raises(ValueError, match=r"op: budget=3; expected budget >= 4; sinks and recent tokens come first"):
        check.at_least("op", 4, "sinks and recent tokens come first", budget=3)


def test_same_dtype():
    check.same_dtype("op", q=zeros(1), k=zeros(1), mask=None)
    with pytest.raises(ValueError, match=r"op: mixed dtypes \(q float32, k float16\); expected one dtype; cast them"):
        check.same_dtype("op", q=zeros(1), k=zeros(1).half())


def test_one_of_suggests_the_nearest():
    check.one_of("op", ("torch", "triton"), form="torch")
    with pytest.raises(ValueError, match=r"op: form='tritn'; expected one of 'torch', 'triton'; did you mean 'triton'\?"):
        check.one_of("op", ("torch", "triton"), form="tritn")
    with pytest.raises(ValueError, match=r"form='z'.*; known: torch, triton$"):
        check.one_of("op", ("torch", "triton"), form="z")


def test_nearest():
    assert check.nearest("h20", ["h2o", "snapkv"]) == "did you mean 'h2o'?"
    assert check.nearest("zzz", [f"a{place:02}" for place in range(20)]).endswith("a11 ...")


def test_fail_takes_another_error():
    with pytest.raises(KeyError, match="op: came; expected wanted; the way out"):
        check.fail("op", "came", "wanted", "the way out", error=KeyError)


def test_a_foreign_layout_is_suspected(recwarn):
    check.layout("op", heads=9, length=512)
    check.layout("op", heads=128, length=1)  # one token of a wide model while decoding
    assert recwarn.list == []
    with pytest.warns(UserWarning, match=r"op: heads=512 exceeds length=9; .*memlens\.layout\.from_fla"):
        check.layout("op", heads=512, length=9)


def test_a_foreign_layout_is_suspected_once_for_an_operation(monkeypatch, recwarn):
    monkeypatch.setattr(check, "_suspected", set())
    for op in ("one", "other"):
        for length in range(2, 12):
            check.layout(op, heads=128, length=length)
    assert [str(warning.message).partition(":")[0] for warning in recwarn.list] == ["one", "other"]


def test_layouts_convert_there_and_back(generator):
    x = torch.randn(2, 5, 3, 4, generator=generator)  # (batch, length, heads, dim)
    ours = layout.from_fla(x)
    assert ours.shape == (2, 3, 5, 4)
    assert torch.equal(ours[1, 2, 4], x[1, 4, 2])
    assert layout.to_fla(ours).data_ptr() == x.data_ptr()
    assert torch.equal(layout.to_fla(ours), x)
    with pytest.raises(ValueError, match=r"from_fla: x has shape \(2, 3\); expected \(batch, length, heads, dim\)"):
        layout.from_fla(x[:, :, 0, 0][:, :3])


def test_the_export_list_is_the_truth():
    public = {name for name, value in vars(check).items() if getattr(value, "__module__", "") == check.__name__}
    assert set(check.__all__) == {name for name in public if not name.startswith("_")}
