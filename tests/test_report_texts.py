"""Texts of tokens in a report: what each token adds to the completion."""

import itertools

import make_tiny
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import (
    completion,
    decode,
    page,
)
from scripted import write_lines

from oreal_jax.report.alignment import align


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.data())
def test_texts_of_tokens_make_up_the_text_wherever_its_bytes_are_cut(text, data):
    content = text.encode()
    cuts = data.draw(st.lists(st.integers(0, len(content)), max_size=12))
    ends = sorted({0, len(content), *cuts})
    parts = [content[a:b] for a, b in itertools.pairwise(ends)]
    pieces = [part.decode(errors="replace") for part in parts]
    texts = align([*pieces, "<|im_end|>"], text)
    assert texts is not None and "".join(x or "" for x in texts) == text
    for piece, own in zip(pieces, texts, strict=False):
        # In full, but for characters that it begins or completes.
        assert own is not None and set(piece) - {"\ufffd"} <= set(own)


@pytest.mark.parametrize(
    "pieces, text, expected",
    [
        (["a", "\ufffd", "\ufffd", "b"], "a\u00e9b", ["a", "", "\u00e9", "b"]),
        (["\ufffd", "\ufffd", "<|im_end|>"], "\u00e9", ["", "\u00e9", None]),
        ([" caf\ufffd", "\ufffd", " x"], " caf\u00e9 x", [" caf", "\u00e9", " x"]),
        (["It", "is", "7"], "It is 7", ["It", " is", " 7"]),  # leading spaces omitted
        (["7 ", "STOP", "more"], "7 ", ["7 ", None, None]),  # a stop string
        (["7", "! STO", "P"], "7! ", ["7", "! ", None]),
        (["<think>", "a", "</s>"], "<think>a", ["<think>", "a", None]),
        (["a", "\ufffd"], "a\ufffd", ["a", "\ufffd"]),  # cut within a character
        (["a", "\ufffd", "\ufffd"], "a\ufffd", ["a", "", "\ufffd"]),
        (["other"], "text", None),
        ([], "", []),
    ],
)
def test_tokens_have_the_text_that_they_add(pieces, text, expected):
    assert align(pieces, text) == expected


def test_single_bytes_of_a_tokenizer_become_characters():
    tokenizer = make_tiny.tokenizer()
    text = "a\u20ac\u00e9\U0001f600b"
    pieces = [str(tokenizer.decode([token])) for token in tokenizer.encode(text)]
    assert len(pieces) == len(text.encode())
    euro, e, smile = ["", "", "\u20ac"], ["", "\u00e9"], ["", "", "", "\U0001f600"]
    assert align(pieces, text) == ["a", *euro, *e, *smile, "b"]


def test_a_completion_whose_tokens_are_unknown_has_its_text_without_colours(run):
    line = completion(0, 0, 0, "correct", 3)
    del line["pieces"]
    other = completion(0, 0, 1, "incorrect", 3, pieces=["a", "b"])  # of wrong length
    strange = completion(0, 1, 0, "incorrect", 3, completion="something else")
    write_lines(run / "trajectories/step_000000.jsonl", [line, other, strange])
    (rows,) = decode(page(run, "--step", 0))
    contents = [row["content"] for row in rows]
    assert [c["text"] for c in contents[:2]] == [
        line["completion"],
        other["completion"],
    ]
    assert not contents[0]["values"] and not contents[1]["values"]
    assert not contents[2]["exact"]
    assert contents[2]["text"] == "".join(strange["pieces"])
