"""Prompts from files, the hub and TFDS data sets."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from oreal_jax.cli import main
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


def test_parquet_equals_jsonl(tmp_path):
    jsonl = write_lines(tmp_path / "p.jsonl", *ROWS)
    parquet = write_parquet(tmp_path / "p.parquet", *ROWS)
    assert read_prompts(parquet) == read_prompts(jsonl) == PROMPTS


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
        ("[1]", "p.jsonl: row 1: not a JSON object"),
        (f"[\n{GOOD},\n", "p.jsonl:3: not JSON: Expecting value"),
        ('{"prompt": "q", "a": 1}', "p.jsonl:1: no field 'question'; its fields are a"),
        (b'{"question": "\xe9"}', "p.jsonl:1: not JSON: 'utf-8' codec can't decode"),
        ("[" * 100_000, "p.jsonl:1: not JSON: maximum recursion depth"),
        (
            '{"question": "q", "gold_answer": ' + "1" * 5000 + "}",
            "p.jsonl:1: not JSON: Exceeds the limit",
        ),
        (GOOD + "\n{", "p.jsonl:2: not JSON"),
        ('{"question": "q"}', "p.jsonl:1: no field 'gold_answer'; its fields are que"),
        ('{"question": " ", "gold_answer": "1"}', "field 'question' is ' ', expected"),
        ('{"question": "q", "gold_answer": []}', "field 'gold_answer' is [], expected"),
        ('{"question": "q", "gold_answer": true}', "'gold_answer' is True, expected"),
        ('{"question": "q", "gold_answer": NaN}', "'gold_answer' is nan, expected"),
        (GOOD[:-1] + ', "id": [1]}', "field 'id' is [1], expected text"),
        (GOOD[:-1] + ', "id": "\\ud800"}', "field 'id' is '\\ud800', not valid Uni"),
        ("\n".join([GOOD[:-1] + ', "id": 0}'] * 2), "p.jsonl:2: field 'id' is '0', as"),
        (GOOD[:-1] + ', "pass_rate": 1.5}', "'pass_rate' is 1.5, expected 0 to 1"),
        (GOOD[:-1] + ', "pass_rate": "x"}', "'pass_rate' is 'x', expected 0 to 1"),
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
        ("gone.jsonl", "gone.jsonl: no such file"),
        ("empty.jsonl", "empty.jsonl: the file has no rows"),
        ("blank.jsonl", "blank.jsonl: the file has no rows"),
        ("table.csv", "table.csv: expected .jsonl or .parquet, not '.csv'"),
    ],
)
def test_unusable_files_are_reported(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    texts = {"text.parquet": GOOD, "empty.jsonl": "", "blank.jsonl": "\n\n"}
    for file, text in (texts | {"table.csv": "a,b"}).items():
        (tmp_path / file).write_text(text)
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
    assert read_judgements(path) == [
        ("p", "1", "q", {"question": "q", "solution": "s"})
    ]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_a_json_array_is_read_as_rows(tmp_path, name, indent):
    path = tmp_path / name
    path.write_text("\ufeff\n" + json.dumps(ROWS, indent=indent))
    assert read_prompts(path) == PROMPTS


def test_objects_over_several_lines_are_rows(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
    assert read_prompts(path) == PROMPTS
    path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    message = "p.json: row 1: no field 'question'; its fields are data, version"
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_conversations_are_read_as_verl_writes_them(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    user, assistant = ({"role": r, "content": r} for r in ("user", "assistant"))
    row = {
        "data_source": "gsm8k",
        "prompt": [system, user],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": 72},
        "extra_info": {"split": "train", "index": 5},
    }
    labels = {"data_source": "gsm8k", "ability": "math"}
    expected = [Prompt("0", "user", "72", labels=labels)]
    assert read_prompts(write_parquet(tmp_path / "p.parquet", row)) == expected
    assert load_prompts(str(write_lines(tmp_path / "p.jsonl", row))) == expected
    row = {"messages": [user, assistant]}
    (example,) = read_examples(write_lines(tmp_path / "s.jsonl", row))
    assert (example.question, example.solution) == ("user", "assistant")
    path = write_lines(tmp_path / "turns.jsonl", {"messages": [user, assistant, user]})
    with pytest.raises(InputError, match="no field 'question'; its fields are messag"):
        read_examples(path)


def test_rows_with_and_without_id_do_not_collide(tmp_path):
    rows = [{"id": "1"}, {}, {"id": "_1"}, {}]
    rows = [{"question": "q", "gold_answer": "1"} | row for row in rows]
    prompts = read_prompts(write_lines(tmp_path / "p.jsonl", *rows))
    assert [prompt.id for prompt in prompts] == ["1", "__1", "_1", "3"]


# TFDS


def test_a_data_set_contains_the_prompts_it_was_built_from(built):
    assert load_prompts(str(built)) == PROMPTS
    assert [path.name for path in built.parent.iterdir()] == ["data"]


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


class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set of another project, with two splits."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"problem": tfds.features.Text(), "answer": np.int64}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str):
        yield 0, {"problem": split, "answer": 7}


def test_the_split_of_a_tfds_set_is_named(tmp_path, built):
    tfds.disable_progress_bar()
    builder = Rows(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = str(builder.data_dir)
    load = lambda source: load_prompts(source, "problem", "answer")
    assert load(f"{source}:test") == [Prompt("0", "test", "7")]
    assert load_prompts(f"{built}:train") == PROMPTS
    for name in (source, f"{source}:dev"):
        message = f"{name}: name one of its splits (test, train), as in {source}:train"
        with pytest.raises(InputError, match=re.escape(message)):
            load(name)
    with pytest.raises(InputError, match="no field 'question'; its fields are answer"):
        load_prompts(f"{source}:test")


# The hub, without a network


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Return the folder of a downloaded set of the hub."""
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path)
    )
    return tmp_path


def test_the_split_of_a_hub_set_is_named(hub):
    row = lambda text: {"question": text, "gold_answer": "1", "pass_rate": 0.5}
    for name in ("main/train", "main/test", "socratic/train"):
        (hub / name).parent.mkdir(exist_ok=True)
        for part in range(2):
            file = hub / f"{name}-0000{part}-of-00002.parquet"
            write_parquet(file, row(f"{name} {part}"))
    prompts = lambda *ids: [
        Prompt(f"{id}-of-00002/0", id.replace("-0000", " "), "1", 0.5) for id in ids
    ]
    main = [f"main/train-0000{part}" for part in range(2)]
    every = [*main, *(f"socratic/train-0000{part}" for part in range(2))]
    source = "someone/maths-v1.5"
    assert load_prompts(f"{source}:train") == prompts(*every)
    ids = [prompt.id for prompt in load_prompts(f"{source}:main/train")]
    assert ids == [f"{id}-of-00002/0".removeprefix("main/") for id in main]
    for name in (source, f"{source}:dev"):
        message = f"{name}: name one of its splits (main/test, main/train, socratic/"
        with pytest.raises(InputError, match=re.escape(message)):
            load_prompts(name)


def test_a_hub_set_of_one_split_needs_no_name(hub):
    write_lines(hub / "test.jsonl", {"question": "q", "gold_answer": "2"})
    assert load_prompts("someone/maths") == [Prompt("test/0", "q", "2")]


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


# Object stores


def test_files_of_object_stores_are_read_through_fsspec(tmp_path):
    store, source = fsspec.filesystem("memory"), "memory://bucket/p.jsonl"
    path = write_lines(tmp_path / "p.jsonl", *ROWS, {"question": "q"})
    store.put(str(path), source)
    with pytest.raises(InputError, match=f"^{source}:5: no field 'gold_answer'"):
        load_prompts(source)
    store.put(str(write_lines(path, *ROWS)), source)
    assert load_prompts(source) == PROMPTS


@pytest.mark.parametrize(
    "source", ["memory://bucket/gone.jsonl", "gs://b/p.jsonl", "nowhere://p.jsonl"]
)
def test_an_unreadable_object_is_named(source):
    with pytest.raises(InputError, match=f"^{source}: not readable: ") as caught:
        load_prompts(source)
    assert "\n" not in str(caught.value)


PRESET = ["--evaluation", "math500", "--folder", "gs://b/sets"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "configs/tiny.py", "--run", "gs://b/run"],
        ["train", "configs/tiny.py", "--set", "model=s3://b/m"],
        ["sample", "--model", "gs://b/m", "--prompt", "1 + 1?"],
        ["eval", "--model", "m", "--data", "p.jsonl", "--json", "s3://b/r.json"],
        ["data", "build", "--data", "p.jsonl", "--out", "gs://b/prompts"],
        ["data", "build", "--data", "p.jsonl", "--out", "o", *PRESET],
        ["convert", "to-hf", "gs://b/run", "out"],
    ],
)
def test_a_path_of_an_object_store_is_refused_by_name(
    tmp_path, monkeypatch, capsys, words
):
    root = Path(__file__).parents[1]
    words = [str(root / word) if word.startswith("configs") else word for word in words]
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(r"(gs|s3)://b/\S+: object stores are supported for data", error)
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())
