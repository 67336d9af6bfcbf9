"""Bad input and faults at the public doors, one test for each row of docs/faults.md that has none in its own module."""

import ast
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import xarray as xr

from memlens import backend, catalog, viz
from memlens.attention.exact import attend
from memlens.attention.merge import merge
from memlens.kv.budget import allocate, tokens
from memlens.kv.cache import prefill
from memlens.kv.policies import h2o, snapkv, streaming
from memlens.kv.score import column_mass
from memlens.kv.select import gather_kv, topk_keep
from memlens.memory.linear import linear_attention
from memlens.optim.lowbit import dyn8
from memlens.optim.projection import svd_subspace
from memlens.routing.caching import simulate
from memlens.routing.gate import mix_experts, topk_gate
from memlens.viz.redraw import redraw
from memlens.viz.store import read_figure

TOP = Path(__file__).parents[1]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["reference", "torch", "triton"])
def form(request) -> str:
    if request.param == "triton" and (problem := backend.triton_problem(torch.zeros(1))):
        pytest.skip(problem)
    return request.param


RANKS = {
    "attend": lambda x: attend(x, x, x),
    "linear_attention": lambda x: linear_attention(x, x, x),
    "column_mass": lambda x: column_mass(x, x),
    "merge": lambda x: merge(x, x, x, x),
    "gather_kv": lambda x: gather_kv(x, x, x),
    "mix_experts": lambda x: mix_experts(x, topk_gate(x[0], 2), x, x, x),
}


@pytest.mark.parametrize("op", RANKS)
def test_a_wrong_rank_names_the_shape_and_the_axes(op):
    with pytest.raises(ValueError, match=rf"{op}: \w+ has shape \([\d, ]+\); expected \(.*all arguments: "):
        RANKS[op](draw(3, 4, 5))


def test_a_vector_for_a_matrix():
    with pytest.raises(ValueError, match=r"svd_subspace: a gradient of shape \(5,\); expected a matrix \(m, n\)"):
        svd_subspace(draw(5), 2)


def test_token_ids_without_a_batch():
    with pytest.raises(ValueError, match=r"prefill: ids has shape \(5,\); expected \(batch, length\)"):
        prefill(None, torch.arange(5))


HEADS = {
    "attend": lambda q, k: attend(q, k, k),
    "linear_attention": lambda q, k: linear_attention(q, k, k),
    "column_mass": lambda q, k: column_mass(q, k),
}


@pytest.mark.parametrize("op", HEADS)
@pytest.mark.parametrize("kv_heads", [2, 4, 0])
def test_head_counts_that_do_not_divide(op, kv_heads):
    with pytest.raises(ValueError, match=rf"{op}: heads=9 is no multiple of \w+={kv_heads}|{op}: k_heads=0; expected"):
        HEADS[op](draw(1, 9, 4, 8), draw(1, kv_heads, 4, 8))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: topk_keep(x, 2), "topk_keep: NaN among the scores"),
        (lambda x: topk_gate(x, 2), "top_experts: scores hold NaN"),
        (lambda x: svd_subspace(x, 2), r"svd_subspace: g\[1, 2\] is nan; expected finite numbers"),
        (lambda x: dyn8(signed=True).encode(x), r"dyn8\.encode: x\[1, 2\] is nan"),
        (lambda x: allocate(x[1], 10), r"allocate: weight.*expected .*|allocate: weights sum to nan"),
    ],
)
def test_nan_is_refused_where_it_would_decide_something(call, says):
    x = draw(3, 4).abs()
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match=says):
        call(x)


def test_a_gate_that_is_nan_is_refused():
    x = draw(1, 2, 5, 4)
    decay = torch.full((1, 2, 5), -0.1)
    decay[0, 1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"linear_attention: log_decay\[0, 1, 3\] is nan"):
        linear_attention(x, x, x, log_decay=decay)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_nan_in_a_query_stays_in_its_row_and_is_not_hidden(form, length):
    q, k, v = draw(1, 4, length, 16), draw(1, 2, length, 16, seed=1), draw(1, 2, length, 16, seed=2)
    row = length // 2
    q[0, 1, row, 3] = torch.nan
    out, lse = attend(q, k, v, return_lse=True, form=form)
    lost = torch.zeros(1, 4, length, dtype=torch.bool)
    lost[0, 1, row] = True
    assert torch.equal(out.isnan().all(-1), lost)
    assert torch.equal(out.isnan().any(-1), lost)
    assert torch.equal(lse.isnan(), lost)


def test_nan_in_a_key_reaches_what_comes_after_it_alone(form):
    q, k, v = draw(1, 2, 7, 16), draw(1, 2, 7, 16, seed=1), draw(1, 2, 7, 16, seed=2)
    k[0, 1, 4, 0] = torch.nan
    out = linear_attention(q, k, v, form=form)[0]
    assert out[0, 1, 4:].isnan().all()
    assert out[0, 1, :4].isfinite().all()
    assert out[0, 0].isfinite().all()


def test_no_keys_give_nothing_and_weigh_nothing(form, assert_close):
    q, k, v = (x.requires_grad_() for x in (draw(1, 2, 3, 8), draw(1, 2, 0, 8), draw(1, 2, 0, 8)))
    none = attend(q, k, v, causal=False, return_lse=True, form=form)
    assert_close(none.out, torch.zeros(1, 2, 3, 8), rtol=0, atol=0)
    assert (none.lse == -torch.inf).all()
    none.out.sum().backward()
    assert not q.grad.any()
    some = attend(q, draw(1, 2, 4, 8), draw(1, 2, 4, 8), causal=False, return_lse=True, form=form)
    assert_close(merge(*none, *some), some)


def test_no_queries_give_an_empty_result(form):
    out, lse = attend(draw(1, 4, 0, 8), draw(1, 2, 3, 8), draw(1, 2, 3, 8), return_lse=True, form=form)
    assert out.shape == (1, 4, 0, 8)
    assert lse.shape == (1, 4, 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: linear_attention(*[draw(1, 2, 0, 4)] * 3), "linear_attention: length=0; expected length >= 1"),
        (lambda: column_mass(draw(1, 2, 0, 4), draw(1, 2, 3, 4)), "column_mass: q_len=0; expected q_len >= 1"),
        (lambda: prefill(None, torch.zeros(1, 0, dtype=torch.long)), "prefill: length=0; expected length >= 1"),
        (lambda: attend(*[draw(0, 2, 3, 4)] * 3), "attend: batch=0; expected batch >= 1"),
        (lambda: attend(*[draw(1, 2, 3, 0)] * 3), "attend: dim=0; expected dim >= 1"),
        (lambda: tokens(length=0, ratio=0.5), "tokens: length=0; expected length >= 1"),
    ],
)
def test_nothing_at_all_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("budget", [5, 6, 10**9])
def test_a_budget_at_or_above_the_length_keeps_all(budget):
    kept = topk_keep(draw(2, 3, 5), budget, first=1, last=2)
    assert torch.equal(kept, torch.arange(5).expand(2, 3, 5))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: topk_keep(draw(5), 0), "topk_keep: budget=0; expected budget >= 1"),
        (lambda: topk_keep(draw(5), 3, first=2, last=2), "budget=3; expected budget >= 4; first=2 and last=2 count inside"),
        (lambda: snapkv(32, window=32), "snapkv: capacity=32; expected capacity >= 33; the window of 32 counts inside it"),
        (lambda: streaming(4, sinks=4), "streaming: budget=4; expected budget >= 5; the 4 sinks count inside it"),
        (lambda: h2o(0, 0), "h2o: budget=0; expected budget >= 1; keep at least one token"),
        (lambda: tokens(length=100, ratio=1.5), r"tokens: ratio=1\.5; expected a share in \(0, 1\]"),
    ],
)
def test_a_budget_that_cannot_be_met(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("k", [0, 9, -1])
def test_more_experts_than_there_are(k):
    with pytest.raises(ValueError, match=rf"top_experts: k={k}; expected k within \[1, 8\]"):
        topk_gate(draw(4, 8), k)


def test_a_cache_of_more_items_than_there_are():
    with pytest.raises(ValueError, match=r"simulate: capacity=9; expected capacity within \[1, 8\]"):
        simulate(torch.zeros(1, 3, 1, dtype=torch.long), 8, 9, "lru")


@pytest.mark.parametrize("op", ["attend", "linear_attention"])
def test_a_mix_of_dtypes_names_each(op):
    x = draw(1, 2, 5, 8)
    with pytest.raises(
        ValueError, match=rf"{op}: mixed dtypes \(q float32, k float16, v float32\); expected one dtype; cast"
    ):
        {"attend": attend, "linear_attention": linear_attention}[op](x, x.half(), x)


def test_whole_numbers_for_attention():
    with pytest.raises(TypeError, match=r"attend: q is torch\.int64; expected a floating dtype"):
        attend(*[torch.ones(1, 1, 2, 4, dtype=torch.long)] * 3)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers: every second element of a wider tensor along the last axis, axes 1 and 2 swapped in memory."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan).transpose(1, 2).contiguous().transpose(1, 2)
    view = wide[..., ::2]
    view.copy_(x)
    assert not view.is_contiguous()
    assert view.stride(-1) == 2
    return view


LAYOUTS = {
    "attend": lambda q, k, v, form: attend(q, k, v, return_lse=True, form=form),
    "linear_attention": lambda q, k, v, form: (lambda out, state: (out, state.S))(*linear_attention(q, k, v, form=form)),
    "column_mass": lambda q, k, v, form: (column_mass(q, k, form=form),),
}


@pytest.mark.parametrize("op", LAYOUTS)
def test_strides_do_not_matter(op, form, assert_close):
    given = draw(2, 4, 13, 16), draw(2, 2, 13, 16, seed=1), draw(2, 2, 13, 16, seed=2)
    results = []
    for change in (torch.clone, strided):
        leaves = [change(x).requires_grad_() for x in given]
        out = tuple(LAYOUTS[op](*leaves, form))
        if op != "column_mass":
            sum((part * draw(*part.shape, seed=3)).sum() for part in out).backward()
        results.append((*out, *(x.grad for x in leaves)))
    assert_close(*reversed(results))


def test_strides_do_not_matter_to_codes_and_gates():
    x = draw(6, 10)
    turned = x.T.contiguous().T
    assert torch.equal(dyn8(signed=True).encode(turned).codes, dyn8(signed=True).encode(x).codes)
    assert all(torch.equal(got, want) for got, want in zip(topk_gate(turned, 3), topk_gate(x, 3), strict=True))
    assert torch.equal(topk_keep(turned, 4, first=1), topk_keep(x, 4, first=1))


CURVE = xr.DataArray([1.0, 2.0, 4.0], dims="budget", coords={"budget": [16, 32, 64]}, name="loss")


@pytest.fixture
def figures(tmp_path, monkeypatch) -> Path:
    """A figures folder with one stored figure in it."""
    monkeypatch.setenv("MEMLENS_FIGURES", str(tmp_path / "figures"))
    viz.save_figure("curve", CURVE, "lines")
    return tmp_path / "figures"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_figures_folder_that_is_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLENS_FIGURES", str(tmp_path / "figures"))
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(OSError, match=r"save_figure: cannot write .*figures.*set MEMLENS_FIGURES"):
        viz.save_figure("curve", CURVE, "lines")
    assert contents(tmp_path) == {"figures": b"a file"}


@pytest.fixture
def read_only(monkeypatch):
    """A figures folder, one figure in it, that this process may read and not write, also where it runs as root."""
    folder = Path(tempfile.mkdtemp(prefix="memlens-test-"))
    monkeypatch.setenv("MEMLENS_FIGURES", str(folder))
    viz.save_figure("curve", CURVE, "lines")
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are tested on POSIX")
def test_a_figures_folder_without_permission(read_only):
    before = contents(read_only)
    with pytest.raises(PermissionError, match=r"save_figure: cannot write .*Permission denied.*set MEMLENS_FIGURES"):
        viz.save_figure("curve", CURVE * 2, "lines")
    assert contents(read_only) == before
    assert viz.save_figure("curve", CURVE, "lines").png == before["curve.png"]


def test_a_figures_folder_on_a_full_disk(tmp_path, monkeypatch):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    try:
        monkeypatch.setenv("MEMLENS_FIGURES", str(place))
        with pytest.raises(OSError, match=r"save_figure: cannot write .*No space left on device.*with room left"):
            viz.save_figure("curve", CURVE, "lines")
        assert contents(place) == {}
    finally:
        subprocess.run(["umount", str(place)], check=True)


CORRUPT = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "text": lambda raw: b"no figure",
    "head flipped": lambda raw: bytes([raw[0] ^ 255]) + raw[1:],
}


@pytest.mark.parametrize("fault", CORRUPT)
def test_a_corrupt_figure_is_named_and_left_alone(figures, fault):
    path = figures / "curve.nc"
    path.write_bytes(CORRUPT[fault](path.read_bytes()))
    before = contents(figures)
    says = r"figures: curve\.nc cannot be read .*; expected a figure that memlens stored; delete it and rerun the notebook"
    for call in (
        lambda: read_figure(path),
        lambda: viz.save_figure("curve", CURVE * 2, "lines"),
        lambda: redraw(["curve"]),
    ):
        with pytest.raises(OSError, match=says):
            call()
    assert contents(figures) == before
    path.unlink()
    viz.save_figure("curve", CURVE, "lines")
    xr.testing.assert_equal(read_figure(path)[0]["loss"].drop_attrs(), CURVE)


def test_an_unknown_figure_suggests_the_nearest(figures):
    with pytest.raises(KeyError, match=r"figures: no stored figure 'curv'; did you mean 'curve'\?"):
        redraw(["curv"])


@pytest.mark.parametrize(
    "call", [catalog.find, lambda key: catalog.verdict(key, "claim", kind="exact", measured=1.0, band="== 1")]
)
def test_an_unknown_paper_suggests_the_nearest(call):
    with pytest.raises(KeyError, match=r"catalog: no paper 'h20'; did you mean '(kv/)?h2o'"):
        call("h20")


def rows() -> list[list[str]]:
    lines = (TOP / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\|(?! ?-| ?fault)", line)]


def defined(path: Path) -> set[str]:
    return {
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    }


def test_every_row_of_the_table_names_a_test_that_exists():
    table = rows()
    assert len(table) > 15
    for row in table:
        assert len(row) == 3
        named = re.findall(r"`(tests/[\w/]+\.py)`: `(\w+)`", row[2])
        assert named, row
        for path, test in named:
            assert test in defined(TOP / path), f"{path} has no {test}"
