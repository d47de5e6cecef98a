"""Weights from and to Hugging Face directories, tensor by tensor, without torch.

One table maps Hugging Face's tensors to our tree. Loading first checks all names and
shapes in the file headers, then puts each tensor into its final sharding: the layers of
a large stacked weight are written one by one into zeros on the mesh, so host memory
holds one tensor and small weights in addition to the result.
"""

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from oreal_jax import model
from oreal_jax.checkpoints.families import (
    from_hugging_face,
    rope_fields,
    to_hugging_face,
)
from oreal_jax.errors import InputError
from oreal_jax.files import new_directory, read_json, write_text
from oreal_jax.model import ModelConfig, Params
from oreal_jax.sharding import put

OnTensor = Callable[[str], None]
ignore: OnTensor = lambda name: None
TreePath = tuple[str, ...]

# Stacked weights of at most this size are assembled on the host: on the devices, two
# programs have to be compiled for each, which takes longer.
MAX_HOST_STACK_BYTES = 2**28
AUXILIARY = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges")
AUXILIARY += ("chat_template", "generation_config")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")  # in headers of safetensors files


class Tensor(NamedTuple):
    """A Hugging Face tensor: its name and shape there, and its path in our tree.

    `transposed`: stored as [out, in] there and [in, out] here, where those axes may be
    split into heads. `layer` is the index in a stacked weight, None for others.
    """

    name: str
    shape: tuple[int, ...]
    path: TreePath
    transposed: bool = False
    layer: int | None = None

    def to_ours(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return our form of the tensor; `shape` without the layer axis."""
        return (value.T if self.transposed else value).reshape(shape)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Return Hugging Face's form of our weight."""
        if not self.transposed:
            return value.reshape(self.shape)
        return np.ascontiguousarray(value.reshape(self.shape[::-1]).T)


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def tensors(config: ModelConfig) -> list[Tensor]:
    """List the tensors of a model; the layers of a weight are in order."""
    D, F, V = config.embed, config.mlp, config.vocab
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    in_layer = [
        Tensor("input_layernorm.weight", (D,), ("attention_norm",)),
        Tensor("self_attn.q_proj.weight", (queries, D), ("attention", "query"), True),
        Tensor("self_attn.k_proj.weight", (keys, D), ("attention", "key"), True),
        Tensor("self_attn.v_proj.weight", (keys, D), ("attention", "value"), True),
        Tensor("self_attn.o_proj.weight", (D, queries), ("attention", "output"), True),
        Tensor("post_attention_layernorm.weight", (D,), ("mlp_norm",)),
        Tensor("mlp.gate_proj.weight", (F, D), ("mlp", "gate"), True),
        Tensor("mlp.up_proj.weight", (F, D), ("mlp", "up"), True),
        Tensor("mlp.down_proj.weight", (D, F), ("mlp", "down"), True),
    ]
    if config.qkv_bias:
        in_layer += [
            Tensor("self_attn.q_proj.bias", (queries,), ("attention", "query_bias")),
            Tensor("self_attn.k_proj.bias", (keys,), ("attention", "key_bias")),
            Tensor("self_attn.v_proj.bias", (keys,), ("attention", "value_bias")),
        ]
    if config.qk_norm:
        K = config.head_dim
        in_layer += [
            Tensor("self_attn.q_norm.weight", (K,), ("attention", "query_norm")),
            Tensor("self_attn.k_norm.weight", (K,), ("attention", "key_norm")),
        ]
    table = [Tensor(EMBEDDING, (V, D), ("embedding",))]
    for layer in range(config.layers):
        for name, shape, path, transposed, _ in in_layer:
            name, path = f"model.layers.{layer}.{name}", ("layers", *path)
            table.append(Tensor(name, shape, path, transposed, layer))
    table.append(Tensor("model.norm.weight", (D,), ("final_norm",)))
    if not config.tied:
        table.append(Tensor(HEAD, (V, D), ("head",), True))
    return table


def read_config(directory: Path) -> ModelConfig:
    """Read the model shape from a directory's config.json.

    Raises:
        InputError: no config.json, or an unsupported field.
    """
    path = directory / "config.json"
    return from_hugging_face(read_json(path), str(path))


def auxiliary_files(directory: Path) -> list[str]:
    """List the files of tokenizer, chat template and generation config."""
    return sorted(
        path.name
        for path in directory.iterdir()
        if path.is_file() and path.name.startswith(AUXILIARY)
    )


def load(
    directory: Path,
    dtype: Any = jnp.float32,
    shardings: Params | None = None,
    *,
    on_tensor: OnTensor = ignore,
) -> Params:
    """Load the parameters of a Hugging Face directory in `dtype` and `shardings`.

    Raises:
        InputError: names tensors that are missing, unknown, of another shape or type,
            or not finite, and a vocabulary head that should be tied but differs.
    """
    directory = Path(directory)
    config = read_config(directory)
    stored = _checked_tensors(directory, config)
    with contextlib.ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="numpy"))
            for file in {tensor.file for tensor in stored.values()}
        }

        def read(name: str) -> np.ndarray:
            file = stored[name].file
            value = files[file].get_tensor(name)
            check_finite(value, f"{file}: {name}")
            return value

        has_both = config.tied and HEAD in stored
        if has_both and not np.array_equal(read(HEAD), read(EMBEDDING)):
            raise InputError(
                f"{directory}: {HEAD} differs from {EMBEDDING} although config.json "
                "has tie_word_embeddings=true: set it to false or remove the tensor"
            )
        return build_params(
            config, lambda tensor: read(tensor.name), dtype, shardings, on_tensor
        )


def check_finite(value: np.ndarray, name: str) -> None:
    """Raise InputError if a weight is NaN or infinite.

    With their bits read as signed and as unsigned integers, such values are the
    largest among the positive and among the negative numbers. Two maxima take a sixth
    of the time of `np.isfinite` in bfloat16, the same in float32.
    """
    limits = np.asarray([np.inf, -np.inf], value.dtype)
    for kind, limit in zip("iu", limits, strict=True):
        integer = f"{kind}{value.itemsize}"
        if value.view(integer).max() >= limit.view(integer):
            raise InputError(f"{name}: has NaN or infinite values")


def build_params(
    config: ModelConfig,
    read: Callable[[Tensor], Any],
    dtype: Any,
    shardings: Params | None,
    on_tensor: OnTensor,
) -> Params:
    """Build the parameter tree from tensors that `read` returns one by one."""
    shapes = model.abstract(config, dtype)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    shape_at, sharding_at = _by_path(shapes), _by_path(shardings)
    params: dict[TreePath, Any] = {}
    for tensor in tensors(config):
        path, layer = tensor.path, tensor.layer
        shape, sharding = shape_at[path].shape, sharding_at[path]
        value = np.asarray(read(tensor))
        value = tensor.to_ours(value, shape if layer is None else shape[1:])
        if layer is None:
            params[path] = put(value.astype(dtype, copy=False), sharding)
        elif math.prod(shape) * np.dtype(dtype).itemsize <= MAX_HOST_STACK_BYTES:
            if layer == 0:
                params[path] = np.empty(shape, dtype)
            params[path][layer] = value
            if layer == config.layers - 1:
                params[path] = put(params[path], sharding)
        else:
            if layer == 0:
                params[path] = _zeros_program(shape, jnp.dtype(dtype), sharding)()
            value = value.astype(dtype)
            params[path] = _write_layer(params[path], value, layer, sharding)
        on_tensor(tensor.name)
    return jax.tree.map_with_path(lambda path, _: params[_names(path)], shapes)


def _names(path: Any) -> TreePath:
    return tuple(key.key for key in path)


def _by_path(tree: Any) -> dict[TreePath, Any]:
    return {_names(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@functools.lru_cache
def _zeros_program(shape, dtype, sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache
def _write_program(sharding):
    write = lambda stacked, value, layer: jax.lax.dynamic_update_index_in_dim(
        stacked, value, layer, 0
    )
    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _write_layer(stacked, value: Any, layer: int, sharding):
    """Replace one layer in place; each device receives only its part."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
        value = put(value, jax.sharding.NamedSharding(sharding.mesh, spec))
    return _write_program(sharding)(stacked, value, layer)


def _checked_tensors(directory: Path, config: ModelConfig) -> dict[str, Stored]:
    """Return the tensors of a directory, having compared them with the config.

    Raises:
        InputError: they do not match, or a file is missing or not readable.
    """
    index, single = (
        directory / name
        for name in ("model.safetensors.index.json", "model.safetensors")
    )
    if index.is_file() and single.is_file():
        # transformers loads the single file, vLLM those of the index.
        raise InputError(
            f"{directory}: has {single.name} and {index.name}; remove the one that is "
            "not the model's"
        )
    if not index.is_file() and not single.is_file():
        advice = ""
        if any(directory.glob("*.bin")):
            advice = (
                "; .bin files can run code when they are read: convert them with torch "
                "and transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
            )
        raise InputError(f"{directory}: no {single.name} and no {index.name}{advice}")
    stored = _read_shards(index) if index.is_file() else _read_header(single)
    expected = {tensor.name: tensor.shape for tensor in tensors(config)}
    problems = [f"missing {name}" for name in expected if name not in stored]
    for name, (_, shape, dtype) in stored.items():
        if name.endswith("rotary_emb.inv_freq") or (config.tied and name == HEAD):
            continue
        if name not in expected:
            problems.append(f"unknown {name}")
        elif shape != expected[name]:
            problems.append(f"{name} has shape {shape}, expected {expected[name]}")
        elif dtype not in FLOATS:
            problems.append(f"{name} has type {dtype}, expected {', '.join(FLOATS)}")
    if problems:
        raise InputError(
            f"{directory}: the weights do not match config.json: {_list(problems)}"
        )
    return stored


def _read_shards(index: Path) -> dict[str, Stored]:
    """Return the tensors of the files that an index names.

    Raises:
        InputError: the index has other tensors than the files, or a file is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: no weight_map in it")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise InputError(f"{index}: {name}: {file!r}, expected the name of a file")
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise InputError(f"{index}: names missing files: {_list(missing)}")
    headers = {file: _read_header(index.parent / file) for file in files}
    stored = {(name, file) for file, header in headers.items() for name in header}
    named = set(weight_map.items())
    problems = [f"lacks {name} of {file}" for name, file in sorted(stored - named)]
    problems += [f"{name} is not in {file}" for name, file in sorted(named - stored)]
    if problems:
        raise InputError(f"{index}: does not match its files: {_list(problems)}")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _read_header(file: Path) -> dict[str, Stored]:
    """Return the tensors of a file."""
    try:
        with safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
            slices = {name: opened.get_slice(name) for name in names}
            return {
                name: Stored(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a safetensors file: {error}") from None


def _list(items: list[str], limit: int = 20) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more


def save(
    params: Params,
    config: ModelConfig,
    directory: Path,
    *,
    source: Path | None = None,
    max_shard_size: int = 5 * 10**9,
    on_tensor: OnTensor = ignore,
) -> None:
    """Write a Hugging Face directory in the parameters' dtype.

    Config, tokenizer, chat template and generation config are copied from `source`, in
    a form that transformers 4 and 5 read. At most `max_shard_size` bytes of weights are
    on the host at once.

    Raises:
        InputError: the directory is not empty or cannot be written.
    """
    dtype = jnp.dtype(jax.tree.leaves(params)[0].dtype)
    with new_directory(Path(directory)) as scratch:
        shards = list(_shards(config, dtype.itemsize, max_shard_size))
        _write_weights(params, shards, scratch, on_tensor)
        fields = to_hugging_face(config)
        if source:
            fields = read_json(source / "config.json")
            if fields.pop("rope_parameters", None):  # unknown to transformers 4
                fields |= rope_fields(config.rope)
            for name in auxiliary_files(source):
                shutil.copy2(source / name, scratch / name)
            _rename_tokenizer_fields(scratch / "tokenizer_config.json")
        # The name in transformers 4, and the newer one.
        fields |= {"torch_dtype": dtype.name, "dtype": dtype.name}
        write_json(scratch / "config.json", fields)
        # safetensors writes files with mode 600, and copies keep their original mode.
        for path in scratch.iterdir():
            shutil.copymode(scratch / "config.json", path)


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    write_text(path, json.dumps(fields, indent=2) + "\n")


def _rename_tokenizer_fields(path: Path) -> None:
    """Rename what only transformers 5 knows, to names that both versions read."""
    if not path.is_file():
        return
    fields = read_json(path)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    write_json(path, fields)


def _host_view(array: jax.Array) -> jax.Array | np.ndarray:
    """Return an array on one CPU device as a NumPy array that shares its memory.

    Slicing it compiles no program.
    """
    devices = array.devices()
    is_on_host = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return np.asarray(array) if is_on_host else array


def _write_weights(
    params: Params, shards: list[list[Tensor]], directory: Path, on_tensor: OnTensor
) -> None:
    """Write one safetensors file, or numbered shards and their index."""
    weights, weight_map, total = _by_path(jax.tree.map(_host_view, params)), {}, 0
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for tensor in shard:
            weight = weights[tensor.path]
            weight = weight if tensor.layer is None else weight[tensor.layer]
            values[tensor.name] = tensor.to_theirs(np.asarray(jax.device_get(weight)))
            weight_map[tensor.name] = file
            total += values[tensor.name].nbytes
            on_tensor(tensor.name)
        save_file(values, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _shards(config: ModelConfig, itemsize: int, limit: int) -> Iterator[list[Tensor]]:
    """Group tensors in order into shards of at most `limit` bytes.

    A single tensor may exceed it.
    """
    shard, size = [], 0
    for tensor in tensors(config):
        tensor_bytes = math.prod(tensor.shape) * itemsize
        if shard and size + tensor_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor_bytes
    yield shard
