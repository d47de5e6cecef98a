"""Prompts: reading, TFDS data sets, order, difficulty, chat templates."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import make_tiny
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from oreal_jax.data import (
    PUBLISHED_BANDS,
    Chat,
    Prompt,
    PromptOrder,
    build,
    load_prompts,
    load_tokenizer,
    read_examples,
    read_prompts,
    repeat_by_difficulty,
)
from oreal_jax.errors import InputError

ROWS = [
    {"id": "a", "question": "1 + 1?", "gold_answer": "2", "pass_rate": 0.25},
    {"id": "b", "question": "π ≈ ?\nTwo digits.", "gold_answer": "3.1"},
    {"id": "c", "question": "x", "gold_answer": "7", "pass_rate": 1.0},
]


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def jsonl(tmp_path) -> Path:
    return lines(tmp_path / "prompts.jsonl", ROWS)


def test_rows_become_prompts(jsonl):
    first, second, third = read_prompts(jsonl)
    assert first == Prompt("a", "1 + 1?", "2", 0.25)
    assert second.pass_rate is None and third.pass_rate == 1.0
    assert len({first.key, second.key, third.key}) == 3
    assert first.key == Prompt("a", "another", "answer").key < 2**32


def test_parquet_equals_jsonl(jsonl, tmp_path):
    path = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_prompts(path) == read_prompts(jsonl)


def test_rows_without_id_are_numbered(tmp_path):
    rows = [{"question": "a", "gold_answer": 1}, {"question": "b", "gold_answer": 2}]
    prompts = read_prompts(lines(tmp_path / "prompts.jsonl", rows))
    assert [(p.id, p.gold_answer) for p in prompts] == [("0", "1"), ("1", "2")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "a"}', "invalid.jsonl:2: no field 'gold_answer'; its"),
        (
            '{"question": "", "gold_answer": "1"}',
            "invalid.jsonl:2: field 'question' is ''",
        ),
        ('{"question": "a", "gold_answer": []}', "field 'gold_answer' is []"),
        (
            '{"question": "a", "gold_answer": "1", "pass_rate": 1.5}',
            "'pass_rate' is 1.5",
        ),
        (
            '{"question": "a", "gold_answer": "1", "pass_rate": "x"}',
            "'pass_rate' is 'x'",
        ),
        ('{"question": "a", "gold_answer": "1", "id": "x"}', "'id' is 'x', as in"),
        ("{", "invalid.jsonl:2: not JSON"),
        ("[1]", "invalid.jsonl:2: not a JSON object"),
    ],
)
def test_invalid_rows_are_reported_with_file_line_and_field(tmp_path, row, message):
    path = tmp_path / "invalid.jsonl"
    good = '{"question": "good", "gold_answer": "1", "id": "x"}'
    path.write_text(f"{good}\n{row}\n")
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "no such file"),
        ("empty.jsonl", "", "the file has no rows"),
        ("blank.jsonl", "\n\n", "the file has no rows"),
        ("prompts.csv", "a,b", "expected .jsonl or .parquet"),
        ("prompts.parquet", "no parquet", "not a parquet file"),
    ],
)
def test_unreadable_files_are_reported(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_prompts(str(path))


def test_sft_examples_need_a_solution(jsonl, tmp_path):
    with pytest.raises(InputError, match="no field 'solution'; its fields are gold"):
        read_examples(jsonl)
    solved = lines(tmp_path / "s.jsonl", [{"question": "a", "solution": "b"}])
    assert read_examples(solved)[0].solution == "b"


def test_a_data_set_contains_the_prompts_it_was_built_from(jsonl, tmp_path):
    prompts = read_prompts(jsonl)
    build(prompts, tmp_path / "data")
    assert load_prompts(str(tmp_path / "data")) == prompts
    assert (tmp_path / "data" / "dataset_info.json").exists()
    assert not list(tmp_path.glob(".*"))  # nothing half-written stays


def test_a_data_set_needs_no_tensorflow(jsonl, tmp_path):
    program = (
        "import sys; from pathlib import Path; from oreal_jax.data import *\n"
        f"build(read_prompts(Path({str(jsonl)!r})), Path({str(tmp_path / 'd')!r}))\n"
        f"assert len(load_prompts({str(tmp_path / 'd')!r})) == 3\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_epoch_is_another_permutation():
    order = PromptOrder(list(range(10)), batch=5, seed=3)
    epochs = [
        [item for start in (10 * e, 10 * e + 5) for item, _ in order.batch(start)]
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_start_only():
    items = [Prompt(str(i), "q", "a") for i in range(7)]
    first, second = (PromptOrder(items, batch=3, seed=5) for _ in range(2))
    for start in (27, 6, 16):  # in any order, from a fresh start
        assert first.batch(start) == second.batch(start)
    another = PromptOrder(items, batch=3, seed=6)
    assert any(first.batch(start) != another.batch(start) for start in range(5))


def test_copies_of_a_prompt_in_a_batch_are_numbered():
    prompt = Prompt("a", "q", "a")
    order = PromptOrder([prompt] * 6, batch=4, seed=0)
    assert [copy for _, copy in order.batch(0)] == [0, 1, 2, 3]


def test_a_batch_larger_than_the_data_set_is_rejected():
    with pytest.raises(InputError, match="takes 4 prompts, the data set has 3"):
        PromptOrder([1, 2, 3], batch=4, seed=0)


def test_prompts_are_repeated_by_the_published_difficulty_bands():
    rates = [0.0, 0.1, 0.2, 0.39, 0.4, 0.5, 0.6, 0.79, 0.8, 1.0, None]
    prompts = [Prompt(str(i), "q", "a", rate) for i, rate in enumerate(rates)]
    times = Counter(p.id for p in repeat_by_difficulty(prompts, PUBLISHED_BANDS))
    expected = [6, 6, 4, 4, 4, 4, 2, 2, 0, 0, 1]
    assert [times[str(i)] for i in range(len(rates))] == expected


def test_prompts_outside_all_difficulty_bands_are_rejected():
    with pytest.raises(InputError, match="all 2 prompts have a pass_rate outside"):
        repeat_by_difficulty([Prompt("a", "q", "a", 0.9)] * 2, PUBLISHED_BANDS)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tiny.tokenizer().save_pretrained(str(directory))
    return Chat(load_tokenizer(directory))


def test_a_question_is_encoded_by_the_tokenizers_own_template(chat):
    tokens = chat.encode("1 + 1?")
    text = chat.tokenizer.decode(tokens)
    assert text == "<|im_start|>u\n1 + 1?<|im_end|>\n<|im_start|>a\n"
    system = Chat(chat.tokenizer, "Be brief.")
    assert chat.tokenizer.decode(system.encode("1 + 1?")).startswith(
        "<|im_start|>s\nBe brief.<|im_end|>"
    )


def test_a_completion_decodes_without_its_stop_token(chat):
    prompt, completion = chat.example("1 + 1?", "It is 2 – ü.")
    assert prompt == chat.encode("1 + 1?")
    assert completion[-1] in chat.stop_tokens()
    assert chat.decode(completion) == "It is 2 – ü."


def test_completions_end_before_the_first_stop_string(chat):
    tokens = chat.tokenizer.encode("one, two; three", add_special_tokens=False)
    assert chat.decode(tokens) == "one, two; three"
    stopping = Chat(chat.tokenizer, stop_strings=["; ", " two", "four"])
    assert stopping.decode(tokens) == "one,"


@pytest.mark.parametrize("text", ["a b\n", "∑ wörld 😀", "<|im_start|>x"])
def test_token_bytes_spell_the_text_of_tokens(chat, text):
    pieces = chat.token_bytes()
    tokens = chat.tokenizer.encode(text, add_special_tokens=False)
    spelled = b"".join(pieces[token] for token in tokens).decode()
    assert spelled == chat.decode(tokens)


def test_pieces_are_the_texts_of_single_tokens(chat):
    tokens = chat.tokenizer.encode("two, two<|im_end|>", add_special_tokens=False)
    for _ in range(2):
        alone = [chat.tokenizer.decode([token]) for token in tokens]
        assert chat.pieces(tokens) == alone


def test_token_bytes_decode_sentencepiece_spelling():
    vocabulary = {"<unk>": 0, "\u2581a": 1, "<0x0A>": 2, "b": 3}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", chat_template="{{ messages }}"
    )
    assert Chat(tokenizer).token_bytes() == [b"", b" a", b"\n", b"b"]


def test_stop_words_are_single_tokens(chat):
    assert len(chat.stop_tokens(("<|im_start|>",))) == 2
    with pytest.raises(InputError, match="'stop' is 4 tokens"):
        chat.stop_tokens(("stop",))


def test_a_tokenizer_without_template_or_files_is_rejected(tmp_path):
    plain = make_tiny.tokenizer()
    plain.chat_template = None
    plain.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="no chat template"):
        Chat(load_tokenizer(tmp_path))
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(tmp_path / "gone")
