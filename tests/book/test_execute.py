"""One notebook in a kernel of its own: what failed, and where."""

from memlens.book.execute import execute
from memlens.book.notebook import code_cells

from .conftest import code, text


def test_the_failing_cell_is_named(put):
    done = execute(put([text("# t"), code("a = 1"), code("a / 0"), code("b = 2")]))
    assert (done.failed_cell, done.error) == (2, "ZeroDivisionError: division by zero")


def test_a_kernel_that_dies_is_named(put):
    done = execute(put([code("a = 1"), code("import os\nos.kill(os.getpid(), 9)")]))
    assert done.failed_cell == 2
    assert "the kernel died" in done.error


def test_a_cell_that_hangs_is_stopped(put):
    done = execute(put([code("import time\ntime.sleep(60)")]), timeout=2)
    assert done.failed_cell == 1
    assert "longer than 2 s" in done.error


def test_parameters_come_after_their_cell_and_the_file_is_left_alone(put):
    path = put([code("size = 'full'", "parameters"), code("print(size)")])
    before = path.read_bytes()
    done = execute(path, parameters={"size": "small"})
    assert code_cells(done.book)[1].outputs[0].text == "small\n"
    assert path.read_bytes() == before
