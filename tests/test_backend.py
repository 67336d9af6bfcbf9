"""Which form runs: `auto` says what it picks and why, and nothing falls back in silence."""

import os
import subprocess
import sys

import pytest
import torch

from memlens import backend
from memlens.backend import Choice, choose, explain

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
    assert explain("op", X) == Choice("torch", "tensors are on the CPU")
    assert choose("op", "auto", X) == "torch"
    assert choose("op", "auto") == "torch"


@pytest.mark.skipif(backend.find_spec("triton") is None, reason="triton is for Linux")
def test_auto_on_a_gpu(no_interpreter):
    assert explain("op", on_gpu()).form == "triton"
    assert explain("op", on_gpu(), X) == Choice("torch", "tensors are on the CPU")
    assert explain("op", on_gpu(), kernel=False) == Choice("torch", "op has no kernel")
    choice = explain("op", on_gpu(torch.float64))
    assert choice.form == "torch"
    assert "not torch.float64" in choice.reason


def test_auto_on_a_gpu_without_triton_says_so(no_triton):
    assert explain("op", on_gpu()) == Choice("torch", "triton is not installed (pip install triton, on Linux)")


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
