"""Import of llama.cpp's .gguf files, dequantised into a Hugging Face directory."""

import functools
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

SPECIAL = 3  # llama.cpp's type of special tokens
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of a pre-tokenizer -> its pattern; "" where it needs none.
SPLITS = {
    "default": "",
    "smollm": "",
    "qwen2": WORDS % "",
    "llama-bpe": WORDS % "{1,3}",
}


def to_hugging_face_directory(
    path: Path, directory: Path, dtype: Any, *, on_tensor: hf.OnTensor = hf.ignore
) -> None:
    """Write config, weights and tokenizer of a .gguf file as a Hugging Face directory.

    Raises:
        InputError: not a gguf file, an unsupported architecture, or tensors that are
            missing or of another shape.
    """
    import gguf

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path}: not a gguf file: {error}") from None
    metadata = functools.partial(_metadata, path, reader)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config, family = _config(path, metadata, stored)
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[family], config.layers)
    sources = {}
    for tensor in hf.tensors(config):
        name = names.get_name(tensor.name, (".weight", ".bias"))
        if name not in stored:
            raise InputError(f"{path}: missing tensor {name}")
        shape = tuple(int(size) for size in stored[name].shape[::-1])
        if shape != tensor.shape:
            raise InputError(
                f"{path}: {name} has shape {shape}, expected {tensor.shape}"
            )
        sources[tensor.name] = stored[name]

    def read(tensor: hf.Tensor) -> np.ndarray:
        source = sources[tensor.name]
        value = gguf.dequantize(source.data, source.tensor_type).reshape(tensor.shape)
        if family == "llama" and ".q_proj." in tensor.name:
            return _split_halves(value, config.heads)
        if family == "llama" and ".k_proj." in tensor.name:
            return _split_halves(value, config.kv_heads)
        return value

    params = hf.build_params(config, read, dtype, None, on_tensor)
    hf.save(params, config, directory)
    _write_tokenizer(path, metadata, directory, config.max_length)


def _split_halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of each head's rows: planes (2i, 2i + 1) back to
    (i, i + K/2)."""
    rows = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return rows.swapaxes(1, 2).reshape(value.shape)


def _metadata(path: Path, reader: Any, name: str, default: Any = None) -> Any:
    """Return a value of a file's metadata; InputError where it has no default."""
    field = reader.get_field(name)
    value = default if field is None else field.contents()
    if value is None:
        raise InputError(f"{path}: metadata has no {name}")
    return value


def _config(
    path: Path, metadata: Callable, stored: dict[str, Any]
) -> tuple[ModelConfig, str]:
    """Return the model shape and the family."""
    family = metadata("general.architecture")
    if family not in FAMILIES:
        raise InputError(
            f"{path}: general.architecture={family!r} is not supported "
            f"({', '.join(FAMILIES)} are)"
        )
    get = lambda name, default=None: metadata(f"{family}.{name}", default)
    scaling = get("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in stored:
        raise InputError(
            f"{path}: {family}.rope.scaling.type={scaling!r} is not supported"
        )
    embed, heads = get("embedding_length"), get("attention.head_count")
    epsilon = get("attention.layer_norm_rms_epsilon")
    config = ModelConfig(
        vocab=len(metadata("tokenizer.ggml.tokens")),
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
        tied="output.weight" not in stored,
        max_length=get("context_length"),
    )
    return config, family


def _write_tokenizer(
    path: Path, metadata: Callable, directory: Path, max_length: int
) -> None:
    """Write the byte-level BPE tokenizer of the metadata, and its special tokens.

    transformers' own reader of .gguf files needs torch.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    get = lambda name, default=None: metadata(f"tokenizer.ggml.{name}", default)
    kind, split = get("model"), get("pre", "default")
    if kind != "gpt2" or split not in SPLITS:
        raise InputError(
            f"{path}: tokenizer.ggml.model={kind!r} with pre={split!r} is not "
            f"supported, only 'gpt2' with {', '.join(SPLITS)}"
        )
    tokens, types = get("tokens"), get("token_type")
    merges = [tuple(merge.split(" ")) for merge in get("merges")]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizer(split)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [token for token, type in zip(tokens, types, strict=True) if type == SPECIAL]
    )
    ids = {
        "bos": int(get("bos_token_id", -1)),
        "eos": int(get("eos_token_id")),
        "pad": int(get("padding_token_id", -1)),
    }
    ids = {name: id for name, id in ids.items() if id >= 0}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=metadata("tokenizer.chat_template", ""),
        model_max_length=max_length,
        **{f"{name}_token": tokens[id] for name, id in ids.items()},
    )
    tokenizer.save_pretrained(str(directory))
    text = json.dumps({f"{name}_token_id": id for name, id in ids.items()}, indent=2)
    (directory / "generation_config.json").write_text(text + "\n")


def pre_tokenizer(split: str) -> Any:
    """Return the pre-tokenizer of llama.cpp's name `split`."""
    from tokenizers import Regex, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "default":
        return plain
    if split == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, plain])
    words = pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, plain])
