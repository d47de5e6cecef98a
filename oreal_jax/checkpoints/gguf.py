"""Import of llama.cpp's .gguf files, dequantised into a Hugging Face directory."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.families import FAMILIES
from oreal_jax.errors import InputError
from oreal_jax.files import new_directory
from oreal_jax.model import ModelConfig
from oreal_jax.model.config import Rope

SPECIAL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of a pre-tokenizer -> its pattern; "" where it needs none.
SPLITS = {
    "default": "",
    "smollm": "",
    "qwen2": WORDS % "",
    "deepseek-r1-qwen": WORDS % "",
    "llama-bpe": WORDS % "{1,3}",
}
ROPE_DIVISORS = "rope_freqs.weight"


def to_hugging_face_directory(
    path: Path, directory: Path, dtype: Any, *, on_tensor: hf.OnTensor = hf.ignore
) -> None:
    """Write config, weights and tokenizer of a .gguf file as a Hugging Face directory.

    Raises:
        InputError: not a gguf file, one of several parts, an unsupported architecture
            or tokenizer, or tensors that are missing, unknown, of another shape or not
            finite.
    """
    import gguf

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path}: not a gguf file: {error}") from None
    metadata = functools.partial(_metadata, path, reader)
    parts = metadata(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, 1)
    if parts > 1:
        part = metadata(gguf.Keys.Split.LLM_KV_SPLIT_NO, 0) + 1
        raise InputError(
            f"{path}: part {part} of {parts} of a split model; join them first: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config, family = _config(path, metadata, stored)
    tokenizer, token_ids = _tokenizer(path, metadata, config.max_length)
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[family], config.layers)
    unknown = stored.keys() - {ROPE_DIVISORS}
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
        unknown.remove(name)
    if unknown:
        raise InputError(f"{path}: unknown tensor {min(unknown)}")

    def read(tensor: hf.Tensor) -> np.ndarray:
        value = _dequantize(sources[tensor.name]).reshape(tensor.shape)
        hf.check_finite(value, f"{path}: {sources[tensor.name].name}")
        if family == "llama" and ".q_proj." in tensor.name:
            return _split_halves(value, config.heads)
        if family == "llama" and ".k_proj." in tensor.name:
            return _split_halves(value, config.kv_heads)
        return value

    with new_directory(directory) as scratch:
        params = hf.build_params(config, read, dtype, None, on_tensor)
        hf.save(params, config, scratch)
        tokenizer.save_pretrained(str(scratch))
        hf.write_json(scratch / "generation_config.json", token_ids)


def _dequantize(tensor: Any) -> np.ndarray:
    import gguf

    return gguf.dequantize(tensor.data, tensor.tensor_type)


def _split_halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of each head as Hugging Face stores them.

    llama.cpp stores a plane's rows next to each other: (2i, 2i + 1) -> (i, i + K/2).
    """
    rows = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return rows.swapaxes(1, 2).reshape(value.shape)


def _metadata(path: Path, reader: Any, name: str, default: Any = None) -> Any:
    """Return a value of a file's metadata.

    Raises:
        InputError: it is not there and has no default.
    """
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
    if scaling != "none":
        raise InputError(
            f"{path}: {family}.rope.scaling.type={scaling!r} is not supported"
        )
    embed, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", embed // heads)
    rope = Rope(theta=float(get("rope.freq_base", 10_000.0)))
    if ROPE_DIVISORS in stored:
        rope = _llama3_rope(path, rope.theta, head_dim, stored[ROPE_DIVISORS])
    epsilon = get("attention.layer_norm_rms_epsilon")
    config = ModelConfig(
        vocab=len(metadata("tokenizer.ggml.tokens")),
        embed=embed,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp=get("feed_forward_length"),
        rope=rope,
        norm_epsilon=float(f"{epsilon:.6g}"),  # stored as float32
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied="output.weight" not in stored,
        max_length=get("context_length"),
    )
    return config, family


def _llama3_rope(path: Path, theta: float, head_dim: int, tensor: Any) -> Rope:
    """Return the embedding whose frequencies are divided by the values of `tensor`.

    The file does not have the parameters, which are the same in Llama 3.1 to 3.3 but
    for the factor.

    Raises:
        InputError: the values are those of other parameters.
    """
    divisors = _dequantize(tensor)
    rope = Rope(
        theta=theta,
        kind="llama3",
        factor=float(divisors.max()),
        original_max_length=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    plain, scaled = (r.frequencies(head_dim)[0] for r in (Rope(theta=theta), rope))
    expected = np.divide(plain, scaled)
    same_shape = divisors.shape == expected.shape
    if not same_shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(
            f"{path}: {ROPE_DIVISORS} is not that of Llama 3.1 to 3.3, others are not "
            "supported"
        )
    return rope


def _tokenizer(
    path: Path, metadata: Callable, max_length: int
) -> tuple[Any, dict[str, Any]]:
    """Return the byte-level BPE tokenizer of the metadata, and its special tokens.

    The latter are those of generation_config.json. transformers' own reader of .gguf
    files needs torch.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
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
    added = [
        AddedToken(token, special=type == SPECIAL, normalized=False)
        for token, type in zip(tokens, types, strict=True)
        if type in (SPECIAL, USER_DEFINED)
    ]
    core.add_tokens(added)  # they keep their ids
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
    turn = int(get("eot_token_id", ids["eos"]))  # ends a turn of a conversation
    stops = {"eos": sorted({ids["eos"], turn})} if turn != ids["eos"] else {}
    return tokenizer, {f"{name}_token_id": id for name, id in (ids | stops).items()}


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
