"""Import of llama.cpp's .gguf files: dequantised into a Hugging Face directory.

Only reading the file is special; what comes out is an ordinary Hugging Face directory,
which is all that the rest of the project knows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.families import FAMILIES
from oreal_jax.errors import InputError
from oreal_jax.model import ModelConfig
from oreal_jax.model.config import Rope

# Hugging Face's name of a tensor within a layer -> llama.cpp's.
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

CONTROL = 3  # llama.cpp's type of special tokens
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of a pre-tokenizer -> its pattern; "" where it is made of parts.
SPLITS = {
    "default": "",
    "smollm": "",
    "qwen2": WORDS % "",
    "llama-bpe": WORDS % "{1,3}",
}


def to_hugging_face_directory(
    path: Path, directory: Path, dtype: Any, *, on_tensor: hf.OnTensor = hf.ignore
) -> None:
    """Writes config, weights and tokenizer of a .gguf file as a Hugging Face directory.

    Raises:
        InputError: not a gguf file, another architecture, or tensors that do not fit.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path}: not a gguf file: {error}") from None
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, reader, tied="output.weight" not in stored)
    interleaved = _field(path, reader, "general.architecture") == "llama"
    sources = []
    for tensor in hf.tensors(config):
        name = _their_name(tensor.name)
        if name not in stored:
            raise InputError(f"{path}: missing tensor {name}")
        shape = tuple(int(size) for size in stored[name].shape[::-1])
        if shape != tensor.shape:
            raise InputError(
                f"{path}: {name} has shape {shape}, expected {tensor.shape}"
            )
        heads = None
        if interleaved and ".q_proj." in tensor.name:
            heads = config.heads
        elif interleaved and ".k_proj." in tensor.name:
            heads = config.kv_heads
        sources.append((tensor, _reader(stored[name], heads)))
    params = hf.assemble(config, sources, dtype, None, on_tensor)
    hf.save(params, config, directory)
    _write_tokenizer(path, reader, directory)


def _reader(tensor: Any, heads: int | None) -> Callable[[], np.ndarray]:
    """Dequantises one tensor when called."""
    from gguf import dequantize

    def read() -> np.ndarray:
        value = dequantize(tensor.data, tensor.tensor_type)
        value = value.reshape([int(size) for size in tensor.shape[::-1]])
        return value if heads is None else _halves(value, heads)

    return read


def _halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaving of each head's rows: planes (2i, 2i + 1) back to
    (i, i + K/2)."""
    rows = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return rows.swapaxes(1, 2).reshape(value.shape)


def _their_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{IN_LAYER[part]}.{kind}"


def _field(path: Path, reader: Any, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    value = default if field is None else field.contents()
    if value is None:
        raise InputError(f"{path}: metadata has no {name}")
    return value


def _config(path: Path, reader: Any, *, tied: bool) -> ModelConfig:
    family = _field(path, reader, "general.architecture")
    if family not in FAMILIES:
        raise InputError(
            f"{path}: general.architecture={family!r} is not supported "
            f"({', '.join(FAMILIES)} are)"
        )
    get = lambda name, default=None: _field(path, reader, f"{family}.{name}", default)
    scaling = get("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in {t.name for t in reader.tensors}:
        raise InputError(
            f"{path}: {family}.rope.scaling.type={scaling!r} is not supported"
        )
    embed, heads = get("embedding_length"), get("attention.head_count")
    epsilon = get("attention.layer_norm_rms_epsilon")
    return ModelConfig(
        vocab=len(_field(path, reader, "tokenizer.ggml.tokens")),
        embed=embed,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", embed // heads),
        mlp=get("feed_forward_length"),
        rope=Rope(theta=float(get("rope.freq_base", 10_000.0))),
        norm_epsilon=float(f"{epsilon:.6g}"),  # stored as float32
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=tied,
        max_length=get("context_length"),
    )


def _write_tokenizer(path: Path, reader: Any, directory: Path) -> None:
    """The byte-level BPE tokenizer that the metadata describes, and its marks.

    Written here because transformers' own reader of .gguf files needs torch.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    get = lambda name, default=None: _field(
        path, reader, f"tokenizer.ggml.{name}", default
    )
    kind, split = get("model"), get("pre", "default")
    if kind != "gpt2" or split not in SPLITS:
        raise InputError(
            f"{path}: tokenizer.ggml.model={kind!r} with pre={split!r} is not "
            f"supported, only 'gpt2' with {', '.join(SPLITS)}"
        )
    tokens = get("tokens")
    merges = [tuple(merge.split(" ")) for merge in get("merges")]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizer(split)
    core.decoder = decoders.ByteLevel()
    kinds = get("token_type")
    core.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    )
    ids = {
        "bos": get("bos_token_id", -1),
        "eos": get("eos_token_id"),
        "pad": get("padding_token_id", -1),
    }
    ids = {name: int(i) for name, i in ids.items() if i >= 0}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=_field(path, reader, "tokenizer.chat_template", ""),
        model_max_length=_config(path, reader, tied=True).max_length,
        **{f"{name}_token": tokens[i] for name, i in ids.items()},
    )
    tokenizer.save_pretrained(str(directory))
    text = json.dumps({f"{name}_token_id": i for name, i in ids.items()}, indent=2)
    (directory / "generation_config.json").write_text(text + "\n")


def pre_tokenizer(split: str) -> Any:
    """How a text is cut before bytes are merged, by llama.cpp's name for it."""
    from tokenizers import Regex, pre_tokenizers

    if split == "default":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return pre_tokenizers.Sequence([digits, rest])
    cut = pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([cut, bytes_])
