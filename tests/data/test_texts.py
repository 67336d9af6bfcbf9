"""Slices of text: addressed, named, reproducible."""

import pytest
import torch

from memlens import data
from memlens.data.texts import Slice


class Words:
    """A tokenizer by blanks, called as Hugging Face's are; it counts its calls."""

    def __init__(self):
        self.ids, self.calls = {}, 0

    def __call__(self, content, *, add_special_tokens, verbose):
        assert not add_special_tokens
        self.calls += 1
        return {"input_ids": [self.ids.setdefault(word, len(self.ids)) for word in content.split()]}


def test_the_texts_that_the_families_need():
    needed = {"hamlet", "macbeth", "lear", "othello", "tempest", "paradise_lost", "areopagitica"}
    assert needed <= set(data.names())


@pytest.mark.parametrize("name", data.names())
def test_every_text_is_plain_and_long_enough(name):
    whole = data.text(name)
    assert len(whole) > 90_000
    assert whole.isascii()
    assert "\r" not in whole
    assert "gutenberg" not in whole.lower()


def test_characters_by_offset_and_length():
    whole = data.text("hamlet")
    part = data.text("hamlet", start=1000, length=80)
    assert part == whole[1000:1080]
    assert isinstance(part, Slice)
    assert part.slice_name == "hamlet[1000:1080] characters"
    assert data.text("hamlet", start=len(whole) - 5) == whole[-5:]


def test_bytes_as_ids():
    ids = data.text("lear", start=4, length=7, tokenizer="bytes")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [list(data.text("lear", start=4, length=7).encode())]
    assert ids.slice_name == "lear[4:11] bytes"


def test_tokens_are_offsets_into_the_whole_text_and_tokenised_once():
    tokenizer = Words()
    whole = data.text("macbeth", tokenizer=tokenizer)
    part = data.text("macbeth", start=500, length=64, tokenizer=tokenizer)
    assert part.shape == (1, 64)
    assert torch.equal(part, whole[:, 500:564])
    assert part.slice_name == "macbeth[500:564] tokens"
    assert tokenizer.calls == 1
    data.text("tempest", length=5, tokenizer=tokenizer)
    assert tokenizer.calls == 2
    other = Words()
    data.text("macbeth", length=5, tokenizer=other)
    assert other.calls == 1


def test_a_slice_is_ours_to_change():
    tokenizer = Words()
    data.text("lear", length=8, tokenizer=tokenizer).zero_()
    assert data.text("lear", length=8, tokenizer=tokenizer).any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": -1}, r"data\.text: start=-1; expected start >= 0"),
        ({"length": 0}, r"data\.text: length=0; expected length >= 1; hamlet has 173942 characters"),
        ({"start": 173_942}, r"data\.text: length=0; expected length >= 1"),
        (
            {"start": 173_900, "length": 43},
            r"hamlet\[173900:173943\] characters; expected an end within its 173942 characters",
        ),
    ],
)
def test_a_slice_beyond_the_text_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        data.text("hamlet", **options)


def test_an_unknown_text_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"name='hamlett'; expected one of 'areopagitica'.*did you mean 'hamlet'"):
        data.text("hamlett")
    with pytest.raises(TypeError, match=r"tokenizer is 'gpt2'; expected None, 'bytes' or a Hugging Face tokenizer"):
        data.text("hamlet", tokenizer="gpt2")


def test_python_source_is_read_from_this_interpreter():
    import json.decoder
    from pathlib import Path

    assert data.python_source("json.decoder") == Path(json.decoder.__file__).read_text(encoding="utf-8")
    part = data.python_source("json.decoder", start=4, length=4, tokenizer="bytes")
    assert part.slice_name == "python:json.decoder[4:8] bytes"
    assert bytes(part[0].tolist()).decode() == data.python_source("json.decoder", start=4, length=4)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("torch", r"module='torch'; expected one of"),
        ("sys", r"'sys' has no Python source; expected one that has, e\.g\. 'argparse'"),
        ("json.nothing", r"'json\.nothing' has no Python source"),
    ],
)
def test_python_source_of_what_has_none(module, says):
    with pytest.raises(ValueError, match=says):
        data.python_source(module)


@pytest.mark.model
def test_hamlet_in_the_real_tokens(smollm2):
    _, tokenizer = smollm2
    ids = data.text("hamlet", start=0, length=16, tokenizer=tokenizer)
    assert data.text("hamlet").startswith(tokenizer.decode(ids[0]))
    assert ids[0, 0] != tokenizer.bos_token_id
