"""Weights from and to Hugging Face directories, tensor by tensor, without torch.

One table says where each Hugging Face tensor lives in our tree. Reading checks all
names and shapes from the file headers first, then puts each tensor straight into its
final sharding: the layers of a large stacked weight are written one by one into zeros
on the mesh, so host memory holds one tensor and small weights beyond the result.
"""

import contextlib
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from oreal_jax import model
from oreal_jax.checkpoints.families import from_hugging_face, to_hugging_face
from oreal_jax.errors import InputError
from oreal_jax.files import read_json
from oreal_jax.model import ModelConfig, Params
from oreal_jax.sharding import put

OnTensor = Callable[[str], None]
ignore: OnTensor = lambda name: None

# Stacked weights of up to this many bytes are assembled on the host: on the devices,
# two programs have to be compiled for each, which takes longer.
MAX_HOST_STACK_BYTES = 2**28

Path_ = tuple[str, ...]  # where a weight lies in our tree


class Tensor(NamedTuple):
    """A Hugging Face tensor: its name and shape, and its place in our tree.

    `turned` says that Hugging Face stores it as [out, in] and we as [in, out]; our
    shape splits those axes further into heads. `layer` is None for weights that are
    not stacked.
    """

    name: str
    shape: tuple[int, ...]
    path: Path_
    layer: int | None
    turned: bool

    def to_ours(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our form of the tensor; `shape` without the layer axis."""
        return (value.T if self.turned else value).reshape(shape)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Hugging Face's form of our weight."""
        if not self.turned:
            return value.reshape(self.shape)
        return np.ascontiguousarray(value.reshape(self.shape[::-1]).T)


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a model in Hugging Face's naming."""
    D, F, V = config.embed, config.mlp, config.vocab
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    per_layer: list[tuple[str, tuple[int, ...], Path_, bool]] = [
        ("input_layernorm.weight", (D,), ("attention_norm",), False),
        ("self_attn.q_proj.weight", (queries, D), ("attention", "query"), True),
        ("self_attn.k_proj.weight", (keys, D), ("attention", "key"), True),
        ("self_attn.v_proj.weight", (keys, D), ("attention", "value"), True),
        ("self_attn.o_proj.weight", (D, queries), ("attention", "output"), True),
        ("post_attention_layernorm.weight", (D,), ("mlp_norm",), False),
        ("mlp.gate_proj.weight", (F, D), ("mlp", "gate"), True),
        ("mlp.up_proj.weight", (F, D), ("mlp", "up"), True),
        ("mlp.down_proj.weight", (D, F), ("mlp", "down"), True),
    ]
    if config.qkv_bias:
        per_layer += [
            ("self_attn.q_proj.bias", (queries,), ("attention", "query_bias"), False),
            ("self_attn.k_proj.bias", (keys,), ("attention", "key_bias"), False),
            ("self_attn.v_proj.bias", (keys,), ("attention", "value_bias"), False),
        ]
    if config.qk_norm:
        K = (config.head_dim,)
        per_layer += [
            ("self_attn.q_norm.weight", K, ("attention", "query_norm"), False),
            ("self_attn.k_norm.weight", K, ("attention", "key_norm"), False),
        ]
    table = [Tensor("model.embed_tokens.weight", (V, D), ("embedding",), None, False)]
    for layer in range(config.layers):
        for name, shape, path, turned in per_layer:
            full = f"model.layers.{layer}.{name}"
            table.append(Tensor(full, shape, ("layers", *path), layer, turned))
    table.append(Tensor("model.norm.weight", (D,), ("final_norm",), None, False))
    if not config.tied:
        table.append(Tensor("lm_head.weight", (V, D), ("head",), None, True))
    return table


def read_config(directory: Path) -> ModelConfig:
    """The model shape that a directory's config.json describes.

    Raises:
        InputError: no config.json, or a field of it is not supported.
    """
    path = directory / "config.json"
    return from_hugging_face(read_json(path), str(path))


def companions(directory: Path) -> list[str]:
    """The files that go with a model beside config and weights: tokenizer, chat
    template, generation config."""
    wanted = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges")
    wanted += ("chat_template", "generation_config")
    return sorted(
        path.name
        for path in directory.iterdir()
        if path.is_file() and path.name.startswith(wanted)
    )


def load(
    directory: Path,
    dtype: Any = jnp.float32,
    shardings: Params | None = None,
    *,
    on_tensor: OnTensor = ignore,
) -> Params:
    """The parameters of a Hugging Face directory, in `dtype`, laid out as `shardings`.

    Raises:
        InputError: tensors are missing, unknown or misshaped; all are listed.
    """
    directory = Path(directory)
    config = read_config(directory)
    files = _files(directory)
    _check(directory, config, files)
    with contextlib.ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="numpy"))
            for path in set(files.values())
        }
        sources = [
            (t, functools.partial(opened[files[t.name]].get_tensor, t.name))
            for t in tensors(config)
        ]
        return assemble(config, sources, dtype, shardings, on_tensor)


def assemble(
    config: ModelConfig,
    sources: list[tuple[Tensor, Callable[[], Any]]],
    dtype: Any,
    shardings: Params | None,
    on_tensor: OnTensor,
) -> Params:
    """Builds the parameter tree from tensors read one by one; the layers of a weight
    come in order."""
    shapes = model.abstract(config, dtype)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, shapes)
    params: Params = {}
    for tensor, read in sources:
        shape, sharding = _at(shapes, tensor.path), _at(shardings, tensor.path)
        whole = shape.shape if tensor.layer is None else shape.shape[1:]
        value = tensor.to_ours(np.asarray(read()), whole)
        if tensor.layer is None:
            _set(params, tensor.path, put(value.astype(dtype, copy=False), sharding))
        elif math.prod(shape.shape) * np.dtype(dtype).itemsize <= MAX_HOST_STACK_BYTES:
            if tensor.layer == 0:
                _set(params, tensor.path, np.empty(shape.shape, dtype))
            stacked = _at(params, tensor.path)
            stacked[tensor.layer] = value
            if tensor.layer == len(stacked) - 1:
                _set(params, tensor.path, put(stacked, sharding))
        else:
            if tensor.layer == 0:
                start = _zeros(shape.shape, jnp.dtype(dtype), sharding)
                _set(params, tensor.path, start)
            stacked = _at(params, tensor.path)
            value = value.astype(dtype)
            _set(
                params,
                tensor.path,
                _write_layer(stacked, value, tensor.layer, sharding),
            )
        on_tensor(tensor.name)
    return params


@functools.lru_cache
def _zeros_program(shape, dtype, sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _zeros(shape, dtype, sharding):
    return _zeros_program(shape, dtype, sharding)()


@functools.lru_cache
def _write_program(sharding):
    write = lambda stacked, value, layer: jax.lax.dynamic_update_index_in_dim(
        stacked, value, layer, 0
    )
    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _write_layer(stacked, value: Any, layer: int, sharding):
    """`stacked` with one layer replaced, in place; each device gets its part only."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
        place = jax.sharding.NamedSharding(sharding.mesh, spec)
        value = put(value, place)
    return _write_program(sharding)(stacked, value, layer)


def _files(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise InputError(f"{index}: no weight_map in it")
        missing = sorted({n for n in listed.values() if not (directory / n).is_file()})
        if missing:
            raise InputError(
                f"{index}: names files that are not there: {_list(missing)}"
            )
        return {name: directory / file for name, file in listed.items()}
    path = directory / "model.safetensors"
    if not path.is_file():
        raise InputError(
            f"{directory}: no model.safetensors and no model.safetensors.index.json"
        )
    return dict.fromkeys(_header(path), path)


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a file."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return {n: tuple(file.get_slice(n).get_shape()) for n in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file: {error}") from None


def _check(directory: Path, config: ModelConfig, files: Mapping[str, Path]) -> None:
    """Compares names and shapes with what the config calls for."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        found |= _header(path)
    expected = {t.name: t.shape for t in tensors(config)}
    harmless = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        harmless.add("lm_head.weight")
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [
        f"unknown {name}"
        for name in found
        if name not in expected and name not in harmless
    ]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise InputError(
            f"{directory}: the weights do not fit config.json: {_list(problems)}"
        )


def _list(items: list[str], most: int = 20) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more


def _at(tree: Any, path: Path_) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _set(tree: Any, path: Path_, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def save(
    params: Params,
    config: ModelConfig,
    directory: Path,
    *,
    source: Path | None = None,
    max_shard_size: int = 5 * 10**9,
    on_tensor: OnTensor = ignore,
) -> None:
    """Writes a Hugging Face directory in the parameters' own dtype.

    Config, tokenizer, chat template and generation config come from `source`. At most
    `max_shard_size` bytes of weights are on the host at a time. The directory appears
    when it is whole.

    Raises:
        InputError: the directory exists and is not empty, or cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: exists and is not an empty directory")
    dtype = jnp.dtype(jax.tree.leaves(params)[0].dtype).name
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=f".{directory.name}-"
        )
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None
    with scratch as name:
        made = Path(name) / "made"
        made.mkdir()
        _write_weights(params, config, made, max_shard_size, on_tensor)
        fields = to_hugging_face(config, dtype)
        if source:
            fields = read_json(source / "config.json")
            fields.pop("torch_dtype", None)
            fields["dtype"] = dtype
            for companion in companions(source):
                shutil.copy2(source / companion, made / companion)
        (made / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        if directory.exists():
            directory.rmdir()
        made.rename(directory)


def _write_weights(params, config, directory: Path, limit: int, on_tensor) -> None:
    """One safetensors file, or numbered shards and their index."""
    shards = list(_shards(config, jax.tree.leaves(params)[0].dtype.itemsize, limit))
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        values = {}
        for tensor in shard:
            weight = _at(params, tensor.path)
            weight = weight if tensor.layer is None else weight[tensor.layer]
            values[tensor.name] = tensor.to_theirs(np.asarray(jax.device_get(weight)))
            weight_map[tensor.name] = file
            total += values[tensor.name].nbytes
            on_tensor(tensor.name)
        save_file(values, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")


def _shards(config: ModelConfig, itemsize: int, limit: int) -> Iterator[list[Tensor]]:
    """Tensors in order, grouped so that no group exceeds `limit` bytes (one tensor
    alone may)."""
    group, size = [], 0
    for tensor in tensors(config):
        bytes_ = int(np.prod(tensor.shape)) * itemsize
        if group and size + bytes_ > limit:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += bytes_
    yield group
