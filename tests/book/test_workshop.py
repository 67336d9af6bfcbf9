"""Student copies: blanked where they should be, failing at the checks and nowhere else."""

from memlens.book.notebook import read
from memlens.book.workshop import make_workshop, prove, student

from .conftest import code, whole


def test_solutions_keep_their_comments_and_lose_their_code(put):
    copy = student(read(put(whole())))
    solution = next(cell for cell in copy.cells if "solution" in cell.metadata.get("tags", []))
    assert solution.source == "# the next number\n...  # your code here"


def test_the_original_is_not_changed_and_a_good_pair_is_proven(put, clone, capsys):
    path = put(whole())
    before = path.read_bytes()
    assert make_workshop() == 0
    assert path.read_bytes() == before
    assert "proven kv/h2o" in capsys.readouterr().out
    assert (clone / "workshop" / "kv" / "h2o.ipynb").exists()


def test_a_check_that_passes_without_a_solution_is_found(put):
    path = put([*whole(), code("# nothing\npass", "solution"), code("assert len([]) == 0", "check")])
    wrong = prove(path, student(read(path)))
    assert wrong == ["the check in code cell 10 passes without a solution"]


def test_a_wrong_solution_is_found(put):
    path = put(whole(solution="y = x + 2"))
    wrong = prove(path, student(read(path)))
    assert "the solved copy fails in code cell 6" in wrong[0]


def test_the_figures_of_the_small_runs_are_not_kept(put, clone, monkeypatch):
    monkeypatch.setenv("MEMLENS_FIGURES", str(clone / "figures"))
    data = "xr.DataArray([1.0], dims='k', name='v').to_dataset()"
    drawn = f"import xarray as xr\nfrom memlens import viz\n_ = viz.save_figure('x', {data}, 'lines', x='k', y='v')"
    path = put([*whole(), code(drawn)])
    assert prove(path, student(read(path))) == []
    assert not list(clone.glob("figures/x.*"))
