"""Which form runs: `auto` says what it picks and why, and nothing falls back in silence."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memlens import backend
from memlens.attention.exact import attend
from memlens.attention.prefix import prefix_attend
from memlens.attention.sparse import block_attend
from memlens.backend import OPERATIONS, Choice, choose, explain
from memlens.memory.linear import linear_attention

X = torch.zeros(2)


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU; the choice looks at nothing else."""

    @property
    def device(self):
        return torch.device("cuda:0")


def on_gpu(dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(2, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_a_named_form_is_taken(form):
    assert choose("op", form, X) == form


def test_auto_on_a_cpu():
    assert explain("attend", X) == Choice("torch", "tensors are on cpu")
    assert explain("attend", torch.zeros(2, device="meta")) == Choice("torch", "tensors are on meta")
    assert explain("attend") == Choice("torch", "tensors are on no device")
    assert choose("op", "auto", X) == "torch"
    assert choose("op", "auto") == "torch"


@pytest.mark.skipif(backend.find_spec("triton") is None, reason="triton is for Linux")
def test_auto_on_a_gpu(no_interpreter):
    assert explain("attend", on_gpu()).form == "triton"
    assert explain("attend", on_gpu(), X) == Choice("torch", "tensors are on cpu")
    assert explain("attend", on_gpu(), kernel=False) == Choice("torch", "the kernel of attend does not take this call")
    assert explain("sparf", on_gpu()) == Choice("torch", "sparf has no kernel")
    choice = explain("attend", on_gpu(torch.float64))
    assert choice.form == "torch"
    assert "not torch.float64" in choice.reason


def test_auto_on_a_gpu_without_triton_says_so(no_triton):
    assert explain("attend", on_gpu()) == Choice("torch", "triton is not installed (pip install triton, on Linux)")


def test_triton_is_refused_where_it_is_not_installed(no_triton):
    with pytest.raises(RuntimeError, match=r"op: form='triton' cannot run: triton is not installed \(pip install triton"):
        choose("op", "triton", X)


@pytest.mark.skipif(backend.find_spec("triton") is None, reason="triton is for Linux")
class TestWithTriton:
    def test_it_is_refused_on_a_cpu(self, no_interpreter):
        with pytest.raises(
            RuntimeError, match=r"tensors are on cpu and no interpreter .* use form='torch', or .*TRITON_INTERPRET=1"
        ):
            choose("op", "triton", X)

    def test_the_interpreter_runs_it_on_a_cpu(self, interpreter):
        assert choose("op", "triton", X, X.half()) == "triton"
        assert backend.triton_problem(X) == ""

    def test_the_interpreter_is_refused_bfloat16(self, interpreter):
        with pytest.raises(RuntimeError, match="interpreter computes bfloat16 products wrongly"):
            choose("op", "triton", X.bfloat16())

    def test_float64_is_refused(self, interpreter):
        with pytest.raises(RuntimeError, match=r"not torch\.float64; cast the inputs or use form='torch'"):
            choose("op", "triton", X.double())

    def test_indices_of_any_type_are_fine(self, interpreter):
        assert choose("op", "triton", X, torch.arange(3), torch.ones(2, dtype=torch.bool)) == "triton"


def test_an_operation_without_a_kernel_says_so():
    with pytest.raises(
        ValueError, match=r"op: form='triton'; expected a form that exists; op has no kernel; use form='torch'"
    ):
        choose("op", "triton", X, kernel=False)


def test_an_unknown_operation_gets_the_nearest():
    with pytest.raises(ValueError, match=r"explain: operation='atend'; expected one of .*did you mean 'attend'"):
        explain("atend", on_gpu())


def chosen(path: Path) -> dict[str, bool]:
    """The operations that a module passes to `backend.choose`, and whether each may have a kernel."""
    found = {}
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        names = {
            n.targets[0].id: n.value for n in nodes if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
        }
        for call in nodes:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "backend.choose":
                op = names[call.args[0].id] if isinstance(call.args[0], ast.Name) else call.args[0]
                found[op.value] = "kernel=False" not in ast.unparse(call)
    return found


def test_the_table_names_every_operation_that_chooses():
    library = Path(backend.__file__).parent
    found = {op: kernel for path in library.rglob("*.py") for op, kernel in chosen(path).items()}
    assert found == OPERATIONS


def blocks(dim: int, size: int):
    x, visible = torch.ones(1, 1, 4, dim), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return block_attend(x, x, x, visible, block_q=size, block_k=16)


def grouped(dim: int):
    own = torch.ones(2, 1, 4, dim)
    return prefix_attend(own, own[0], own[0], own, own)


LIMITS = {
    "attend": (lambda: attend(*[torch.ones(1, 1, 4, 256)] * 3), lambda: attend(*[torch.ones(1, 1, 4, 257)] * 3)),
    "attend with a bias": (
        lambda: attend(*[torch.ones(1, 1, 4, 8)] * 3),
        lambda: attend(*[torch.ones(1, 1, 4, 8)] * 3, bias=torch.ones(4, 4)),
    ),
    "block_attend by dim": (lambda: blocks(256, 16), lambda: blocks(257, 16)),
    "block_attend by block": (lambda: blocks(8, 32), lambda: blocks(8, 24)),
    "prefix_attend": (lambda: grouped(256), lambda: grouped(257)),
    "linear_attention by channel": (
        lambda: linear_attention(*[torch.ones(1, 1, 4, 64)] * 3, log_decay=torch.zeros(1, 1, 4, 64)),
        lambda: linear_attention(*[torch.ones(1, 1, 4, 65)] * 3, log_decay=torch.zeros(1, 1, 4, 65)),
    ),
    "linear_attention": (
        lambda: linear_attention(*[torch.ones(1, 1, 4, 128)] * 3),
        lambda: linear_attention(*[torch.ones(1, 1, 4, 129)] * 3),
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_auto_leaves_to_torch_what_the_kernel_does_not_take(case, monkeypatch):
    taken = []

    def on_a_gpu(op, form, *tensors, kernel=True):
        taken.append("triton" if kernel else "torch")
        return "torch"

    monkeypatch.setattr(backend, "choose", on_a_gpu)
    for call, form in zip(LIMITS[case], ["triton", "torch"], strict=True):
        taken.clear()
        call()
        assert taken[0] == form


def test_an_unknown_form_gets_the_nearest():
    with pytest.raises(ValueError, match=r"op: form='trition'; .*did you mean 'triton'\?"):
        choose("op", "trition", X)


def test_choosing_does_not_import_triton():
    code = (
        "import sys, torch; from memlens import backend; backend.choose('op', 'auto', torch.zeros(1));"
        "print('triton' in sys.modules)"
    )
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "False\n", done.stderr
