"""GGUF files, written as llama.cpp would, convert to their original models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from oreal_jax.checkpoints.gguf import pre_tokenizer, to_hugging_face_directory
from oreal_jax.cli import main
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.errors import InputError


def interleaved(value: np.ndarray, heads: int) -> np.ndarray:
    """Return query or key rows as llama.cpp's converter stores those of Llama."""
    rows = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return rows.swapaxes(1, 2).reshape(value.shape)


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(
    theirs,
    family: str,
    path: Path,
    *,
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """Write a .gguf file as llama.cpp would; `add` adds to it."""
    config = theirs.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    letters = [chr(33 + i) for i in range(config.vocab_size - len(marks) - 1)]
    tokens = [*marks, *letters, "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 4] + [1] * (len(tokens) - len(marks)))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        if family == "llama" and "q_proj" in name:
            array = interleaved(array, config.num_attention_heads)
        if family == "llama" and "k_proj" in name:
            array = interleaved(array, config.num_key_value_heads)
        core, kind = name.rsplit(".", 1)
        parts = core.split(".")
        if len(parts) > 3:
            target = f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:])]}.{kind}"
        else:
            target = f"{GGUF_NAMES[core]}.{kind}"
        writer.add_tensor(target, np.ascontiguousarray(array))
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "family"),
    [("llama", "llama"), ("qwen2-tied", "qwen2"), ("qwen3", "qwen3")],
)
def test_a_gguf_file_converts_to_its_original_model(name, family, tmp_path):
    theirs = families.make(name)
    write_gguf(theirs, family, tmp_path / "model.gguf")
    to_hugging_face_directory(tmp_path / "model.gguf", tmp_path / "hf", jnp.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert read.eos_token == "<|im_end|>" and read.chat_template


def converted(path: Path, name: str, family: str, add) -> Path:
    """Write a .gguf file and convert it."""
    write_gguf(families.make(name), family, path / "model.gguf", add=add)
    to_hugging_face_directory(path / "model.gguf", path / "hf", jnp.float32)
    return path / "hf"


def test_gguf_tokens_keep_their_ids_and_types(tmp_path):
    def add(writer):
        writer.add_tokenizer_pre("deepseek-r1-qwen")
        writer.add_eot_token_id(1)

    chat = Chat(load_tokenizer(converted(tmp_path, "qwen2-tied", "qwen2", add)))
    text = "5<think>7<|im_start|>"
    tokens = chat.tokenizer.encode(text, add_special_tokens=False)
    letter = lambda x: 4 + ord(x) - 33
    assert tokens == [letter("5"), 3, letter("7"), 1]
    assert chat.decode(tokens) == "5<think>7"
    assert chat.stop_tokens() == (1, 2)
    states = [
        pre_tokenizer(name).__getstate__() for name in ("qwen2", "deepseek-r1-qwen")
    ]
    assert states[0] == states[1]


def llama3_divisors(config) -> np.ndarray:
    """Return the tensor that llama.cpp's converter stores for Llama 3.1."""
    rope, head_dim = config.rope_parameters, config.head_dim
    length = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        if wave < length / high:
            divisors.append(1.0)
        elif wave > length / low:
            divisors.append(rope["factor"])
        else:
            smooth = (length / wave - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_a_gguf_file_of_llama_3_1_converts_with_its_rope(factor, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    fields: dict[str, Any] = families.SIZES | {"hidden_size": 64}
    config = transformers.LlamaConfig(**fields, rope_parameters=rope)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    add = lambda writer: writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    write_gguf(theirs, "llama", tmp_path / "model.gguf", add=add)
    to_hugging_face_directory(tmp_path / "model.gguf", tmp_path / "hf", jnp.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(90)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def add_parts(writer: gguf.GGUFWriter) -> None:
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 3)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (add_parts, "part 1 of 3 of a split model"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.full(4, 2, np.float32)),
            "rope_freqs.weight is not that of Llama 3.1",
        ),
        (
            lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(32, np.float32)),
            "unknown tensor blk.0.attn_q.bias",
        ),
        (lambda w: w.add_tokenizer_pre("gpt-4o"), "pre='gpt-4o' is not supported"),
    ],
)
def test_a_gguf_file_that_cannot_be_converted_leaves_nothing_behind(
    add, message, tmp_path, capsys
):
    write_gguf(families.make("llama"), "llama", tmp_path / "model.gguf", add=add)
    arguments = [str(tmp_path / name) for name in ("model.gguf", "run")]
    assert main(["convert", "from-hf", *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    with pytest.raises(InputError, match=f"model.gguf: .*{message}"):
        to_hugging_face_directory(tmp_path / "model.gguf", tmp_path / "hf", jnp.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_gguf_file_of_another_family_is_rejected(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="general.architecture='gemma'"):
        to_hugging_face_directory(tmp_path / "model.gguf", tmp_path / "hf", "float32")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(InputError, match="not a gguf file"):
        to_hugging_face_directory(tmp_path / "text.gguf", tmp_path / "hf", "float32")
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
