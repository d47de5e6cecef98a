"""Prompts from files, the hub and TFDS data sets."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from oreal_jax.data import (
    Prompt,
    build,
    load_prompts,
    read_examples,
    read_judgements,
    read_prompts,
    read_questions,
    repeat_by_difficulty,
)
from oreal_jax.errors import InputError

ROWS = [
    {"id": "one", "question": "1 + 1?", "gold_answer": "2", "pass_rate": 0.7},
    {"id": "two", "question": "√2² – “é”?\n", "gold_answer": "\\frac{4}{2}"},
    {"id": "three", "question": "𝔸 = 数?", "gold_answer": "3", "pass_rate": 0.0},
    {"id": "four", "question": "0.1?", "gold_answer": "1/10", "pass_rate": 1.0},
]
PROMPTS = [Prompt(**row) for row in ROWS]
GOOD = '{"question": "q", "gold_answer": "1"}'


def write_lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, *rows: dict) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("built") / "data"
    build(PROMPTS, directory)
    return directory


# Reading


def test_blank_lines_windows_ends_and_a_byte_order_mark_do_not_matter(tmp_path):
    path = tmp_path / "p.jsonl"
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in ROWS) + "\r\n \r\n"
    path.write_bytes(text.encode())
    assert read_prompts(path) == PROMPTS


def test_keys_are_distinct_32_bit_checksums_of_ids():
    keys = [Prompt(str(i), "q", "1").key for i in range(1000)]
    assert len(set(keys)) == 1000 and min(keys) >= 0 and max(keys) < 2**32
    # The check value that the definition of CRC-32 publishes.
    assert Prompt("123456789", "q", "1").key == 0xCBF43926


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "\n\n[1]", "p.jsonl:3: not a JSON object"),
        (b'{"question": "\xe9"}', "p.jsonl:1: not JSON: 'utf-8' codec can't decode"),
        ("[" * 100_000, "p.jsonl:1: not JSON: maximum recursion depth"),
        (
            '{"question": "q", "gold_answer": ' + "1" * 5000 + "}",
            "p.jsonl:1: not JSON: Exceeds the limit",
        ),
        ('{"question": " ", "gold_answer": "1"}', "field 'question' is ' ', expected"),
        ('{"question": "q", "gold_answer": true}', "'gold_answer' is True, expected"),
        ('{"question": "q", "gold_answer": NaN}', "'gold_answer' is nan, expected"),
        (GOOD[:-1] + ', "id": [1]}', "field 'id' is [1], expected text"),
        (GOOD[:-1] + ', "id": "\\ud800"}', "field 'id' is '\\ud800', not valid Uni"),
        (GOOD[:-1] + ', "pass_rate": NaN}', "'pass_rate' is nan, expected 0 to 1"),
        (GOOD[:-1] + ', "pass_rate": true}', "'pass_rate' is True, expected 0 to 1"),
    ],
)
def test_invalid_rows_are_reported_with_file_line_field_and_value(
    tmp_path, text, message
):
    path = tmp_path / "p.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_invalid_parquet_rows_are_reported_with_their_number(tmp_path):
    rows = [ROWS[0], {"id": "five", "question": "q", "gold_answer": None}]
    path = write_parquet(tmp_path / "p.parquet", *rows)
    with pytest.raises(
        InputError, match="p.parquet: row 2: field 'gold_answer' is None"
    ):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "folder: a directory, expected a .jsonl or .parquet file"),
        ("text.parquet", "text.parquet: not a parquet file"),
    ],
)
def test_unusable_files_are_reported(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.parquet").write_text(GOOD)
    with pytest.raises(InputError) as caught:
        load_prompts(str(tmp_path / name))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_solutions_questions_and_judgements_are_read_from_rows(tmp_path):
    path = write_lines(
        tmp_path / "rows.jsonl",
        {"question": "q", "solution": "s", "prediction": "p", "gold": 1},
    )
    assert [dataclasses.astuple(row) for row in read_examples(path)] == [("q", "s")]
    assert read_questions(path) == ["q"]
    assert read_judgements(path) == [("p", "1", "q")]


# TFDS


def test_pass_rates_are_stored_exactly(tmp_path):
    """A resumed run reads its own copy and must find the same difficulty bands."""
    prompts = [Prompt(str(i), "q", "1", i / 10) for i in range(11)]
    build(prompts, tmp_path / "data")
    back = load_prompts(str(tmp_path / "data"))
    assert [p.pass_rate for p in back] == [i / 10 for i in range(11)]
    bands = tuple((i / 10, (i + 1) / 10, i + 1) for i in range(10))
    assert repeat_by_difficulty(back, bands) == repeat_by_difficulty(prompts, bands)


def test_the_remains_of_a_killed_build_are_removed(built, tmp_path):
    remains = tmp_path / ".data.incomplete" / "prompts"
    shutil.copytree(built, remains / "1.0.0")
    build(PROMPTS[:1], tmp_path / "data")
    assert load_prompts(str(tmp_path / "data")) == PROMPTS[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_data_set_is_never_overwritten(built):
    with pytest.raises(InputError, match="data: exists and is not an empty directory"):
        build(PROMPTS[:1], built)
    assert load_prompts(str(built)) == PROMPTS
    assert [path.name for path in built.parent.iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "array_record"])
def test_a_damaged_data_set_is_reported(built, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    (file,) = (path for path in copy.iterdir() if name in path.name)
    file.write_text("{")
    with pytest.raises(InputError, match="copy: not a data set of prompts: ") as caught:
        load_prompts(str(copy))
    assert "\n" not in str(caught.value)


def test_data_sets_need_no_tensorflow_and_print_nothing(tmp_path):
    program = f"""
import sys
import oreal_jax.data
assert not {{"grain", "tensorflow_datasets", "transformers"}} & sys.modules.keys()
from pathlib import Path
prompts = [oreal_jax.data.Prompt("1", "q", "2")]
build_to = Path({str(tmp_path / "data")!r})
oreal_jax.data.build(prompts, build_to)
assert oreal_jax.data.load_prompts(str(build_to)) == prompts
oreal_jax.data.PromptOrder(prompts, batch=1, seed=0).batch(0)
assert "tensorflow_datasets" in sys.modules and "grain" in sys.modules
assert not {{"tensorflow", "torch"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# The hub, without a network


def test_ids_of_hub_files_with_the_same_name_have_prefixes(tmp_path, monkeypatch):
    for subset in ("algebra", "geometry"):
        (tmp_path / subset).mkdir()
        row = {"question": subset, "gold_answer": "1", "pass_rate": 0.5}
        write_parquet(tmp_path / subset / "train.parquet", row)
    write_lines(tmp_path / "more.jsonl", {"question": "more", "gold_answer": "2"})
    downloads = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **_: downloads.append(name) or str(tmp_path),
    )
    assert load_prompts("someone/maths-v1.5") == [
        Prompt("algebra/train/0", "algebra", "1", 0.5),
        Prompt("geometry/train/0", "geometry", "1", 0.5),
        Prompt("more/0", "more", "2"),
    ]
    assert downloads == ["someone/maths-v1.5"]


def test_an_unreachable_or_empty_hub_data_set_is_reported(tmp_path, monkeypatch):
    def unreachable(name, **_):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        InputError, match="someone/maths: neither a file nor a data set"
    ):
        load_prompts("someone/maths")
    empty = lambda name, **_: str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", empty)
    with pytest.raises(
        InputError, match="someone/maths: the data set has no parquet or"
    ):
        load_prompts("someone/maths")
