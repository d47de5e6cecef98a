"""Questions to tokens and back, with a byte tokenizer saved and read again."""

import json
from pathlib import Path

import make_tiny
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.errors import InputError
from oreal_jax.verify import judge

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Write the tokenizer files of a checkpoint."""
    path = tmp_path_factory.mktemp("model")
    make_tiny.tokenizer().save_pretrained(str(path))
    return path


@pytest.fixture
def chat(directory) -> Chat:
    return Chat(load_tokenizer(directory))


def words(**marks) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **marks)


def test_an_empty_system_prompt_differs_from_none(chat):
    raw = lambda tokens: chat.tokenizer.decode(tokens, skip_special_tokens=False)
    text = "<|im_start|>u\n1 < 2?<|im_end|>\n<|im_start|>a\n"
    assert raw(chat.encode("1 < 2?")) == text
    with_empty_system = Chat(chat.tokenizer, "")
    system = "<|im_start|>s\n<|im_end|>\n"
    assert raw(with_empty_system.encode("1 < 2?")) == system + text


def test_prompt_tokens_equal_those_of_transformers(chat):
    expected = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "数 √2?"}], add_generation_prompt=True
    )
    assert chat.encode("数 √2?") == expected["input_ids"]


@pytest.mark.parametrize("text", ["x = 5 .", "don 't , we", "\n\n é 数 𝔸\t", ""])
def test_completions_decode_exactly_without_the_stop_token(chat, text):
    tokens = chat.tokenizer.encode(text, add_special_tokens=False)
    assert chat.decode([*tokens, chat.tokenizer.eos_token_id]) == text


def test_special_tokens_of_thinking_survive_decoding():
    """Otherwise a box inside thinking would be judged as the answer."""
    tokenizer = make_tiny.tokenizer()
    marks = ["<think>", "</think>", "<|note|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    chat = Chat(tokenizer)
    text = "<think>\\boxed{8}</think> I do <|note|>not know<|im_end|>"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) < len(text)
    decoded = chat.decode(tokens)
    assert decoded == "<think>\\boxed{8}</think> I do not know"
    assert judge(decoded, "8").outcome != "correct"


def test_stop_tokens_are_those_of_model_and_stop_words(tmp_path):
    make_tiny.tokenizer().save_pretrained(str(tmp_path))
    end, start = 256, 257
    assert Chat(load_tokenizer(tmp_path)).stop_tokens() == (end,)
    assert Chat(load_tokenizer(tmp_path)).stop_tokens(["<|im_start|>"]) == (end, start)
    settings = tmp_path / "generation_config.json"
    for own in (3, [3, end]):
        settings.write_text(json.dumps({"eos_token_id": own}))
        assert Chat(load_tokenizer(tmp_path)).stop_tokens() == (3, end)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [4, end]}))
    assert Chat(load_tokenizer(tmp_path)).stop_tokens() == (3, 4, end)
    settings.write_text("{")
    with pytest.raises(
        InputError, match="generation_config.json: not readable as JSON"
    ):
        Chat(load_tokenizer(tmp_path)).stop_tokens()


def test_a_stop_word_must_be_one_known_token(chat):
    with pytest.raises(InputError, match="'' is 0 tokens"):
        chat.stop_tokens([""])
    of_words = Chat(words(unk_token="<unk>", chat_template=make_tiny.TEMPLATE))
    assert of_words.stop_tokens(["b"]) == (2,)
    with pytest.raises(InputError, match="'<|im_end|>' is unknown to the tokenizer"):
        of_words.stop_tokens(["<|im_end|>"])
    with pytest.raises(InputError, match="no end-of-sequence token"):
        of_words.example("a", "b")


def test_a_tokenizer_without_template_is_rejected(tmp_path):
    tokenizer = make_tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="no chat template"):
        Chat(load_tokenizer(tmp_path))


def test_a_template_that_rejects_a_system_prompt_is_reported_at_once():
    tokenizer = make_tiny.tokenizer()
    tokenizer.chat_template = NO_SYSTEM + make_tiny.TEMPLATE
    assert Chat(tokenizer).encode("?")
    with pytest.raises(
        InputError, match="system_prompt='Think.': System role not supp"
    ):
        Chat(tokenizer, "Think.")
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(InputError, match="chat template with .*: division by zero"):
        Chat(tokenizer)


def test_a_template_file_replaces_the_tokenizers_template(directory, tmp_path):
    file = tmp_path / "plain.jinja"
    file.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
    )
    chat = Chat(load_tokenizer(directory), "Think.", file)
    assert chat.decode(chat.encode("1?")) == "system: Think.;user: 1?;"
    file.write_text("{% for")
    with pytest.raises(InputError, match="plain.jinja: the chat template with"):
        Chat(load_tokenizer(directory), None, file)
    with pytest.raises(InputError, match="gone.jinja: no such file"):
        Chat(load_tokenizer(directory), None, tmp_path / "gone.jinja")


@pytest.mark.parametrize("label", ["Qwen2Tokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_text_is_split_by_the_rules_of_tokenizer_json(kind, label, tmp_path):
    """AutoTokenizer reads only the vocabulary where the model is a Qwen2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, "12"])}
    core = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(str(tmp_path))
    for name, fields in {
        "tokenizer_config.json": {"tokenizer_class": label},
        "config.json": {"model_type": kind},
    }.items():
        (tmp_path / name).write_text(json.dumps(fields))
    text = "12 It's e\u0301  \n"
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert expected[0] == vocabulary["12"]
    assert load_tokenizer(tmp_path).encode(text) == expected
    if kind == "qwen2":
        assert AutoTokenizer.from_pretrained(tmp_path).encode(text) != expected


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": "{"},
        {"tokenizer.json": "{}", "tokenizer_config.json": "{}"},
    ],
)
def test_a_directory_without_a_usable_tokenizer_is_reported(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(
        InputError, match=f"{tmp_path}: no usable tokenizer: "
    ) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


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
