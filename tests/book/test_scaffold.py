"""`memlens new` writes four files that are a whole method but for its content, and never over anything."""

import pytest

from memlens.book.check import findings
from memlens.book.scaffold import scaffold


@pytest.fixture
def top(clone):
    (clone / "toolkit/memlens/catalog/papers").mkdir(parents=True)
    return clone


def test_an_unknown_method_gets_four_files(top):
    written = [path.relative_to(top).as_posix() for path in scaffold("kv", "new-idea", top=top)]
    assert written == [
        "toolkit/memlens/kv/new_idea.py", "tests/kv/test_new_idea.py", "notebooks/kv/new-idea.ipynb",
        "toolkit/memlens/catalog/papers/kv.toml",
    ]  # fmt: skip
    for name in written[:2]:
        compile((top / name).read_text(), name, "exec")
    missing = [line for line in findings(top / written[2]) if "execution counts" not in line]
    assert missing == ["no verdict"]
    assert "{{" not in (top / written[2]).read_text()


def test_a_planned_paper_keeps_its_entry_and_lends_its_words(top):
    written = scaffold("kv", "kivi", top=top)
    assert len(written) == 3
    assert "KIVI" in (top / "toolkit/memlens/kv/kivi.py").read_text()


def test_nothing_is_overwritten(top):
    scaffold("kv", "new-idea", top=top)
    with pytest.raises(FileExistsError, match="stands already"):
        scaffold("kv", "new-idea", top=top)
    with pytest.raises(ValueError, match="family='kw'"):
        scaffold("kw", "x", top=top)


def test_a_failure_on_the_way_leaves_nothing(top, monkeypatch):
    from memlens.book import scaffold as module

    real, done = module.replace_text, []

    def until_the_last(path, text):
        if len(done) == 3:
            raise OSError(28, "No space left on device")
        done.append(path)
        real(path, text)

    monkeypatch.setattr(module, "replace_text", until_the_last)
    with pytest.raises(OSError, match="No space"):
        scaffold("kv", "new-idea", top=top)
    assert len(done) == 3
    assert not [path for path in done if path.exists()]
