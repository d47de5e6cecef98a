"""Weights to and from Hugging Face format, byte for byte, and every way it can fail."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from make_tiny import tokenizer
from safetensors.numpy import load_file, save_file

from oreal_jax import metrics, model, program_cache, sharding
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.source import import_model, open_model
from oreal_jax.cli import main
from oreal_jax.errors import InputError
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import ModelConfig

INDEX = "model.safetensors.index.json"


MESHES = [
    MeshShape(fsdp=8),
    MeshShape(fsdp=4, tensor=2),
    MeshShape(data=2, fsdp=2, tensor=2),
]


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return {
        name: value
        for file in sorted(directory.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_same_bytes(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert value.tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2.5-untied", "qwen3", "llama"])
def test_a_round_trip_changes_no_byte(name, dtype, tmp_path):
    start, end = tmp_path / "start", tmp_path / "end"
    families.make(name).to(dtype).save_pretrained(start, max_shard_size="20KB")
    assert len(list(start.glob("*.safetensors"))) > 1
    params = hf.load(start, str(dtype).removeprefix("torch."))
    hf.save(params, hf.read_config(start), end, source=start, max_shard_size=30_000)
    assert_same_bytes(tensors_of(start), tensors_of(end))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_an_export_loads_in_transformers_without_a_warning(name, tmp_path, caplog):
    start, end = tmp_path / "start", tmp_path / "end"
    theirs = families.write(name, start)
    tokenizer().save_pretrained(str(start))
    hf.save(hf.load(start), hf.read_config(start), end, source=start)
    with caplog.at_level(logging.WARNING):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            end, output_loading_info=True
        )
        ours, report = loaded
        assert transformers.AutoTokenizer.from_pretrained(end).chat_template
    assert not caplog.records
    assert not any(report[key] for key in report)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(ours.eval()(tokens).logits, theirs(tokens).logits)


def test_a_model_made_from_scratch_exports_too(tmp_path):
    config = hf.read_config(written(tmp_path / "start"))
    params = model.init(config, jax.random.key(0))
    hf.save(params, config, tmp_path / "end")
    again = hf.load(tmp_path / "end")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


def test_an_export_from_one_cpu_compiles_nothing(tmp_path):
    """A slice of a stack on a device is a program per shape and sharding."""
    config = ModelConfig(  # sizes of no other test
        vocab=11, embed=10, layers=3, heads=2, kv_heads=1, head_dim=6, mlp=14
    )
    params = model.init(config, jax.random.key(0))
    metrics.compilations.take()
    with program_cache.disabled():
        hf.save(params, config, tmp_path / "hf")
    assert metrics.compilations.take()["perf/compilations"] == 0


def written(directory: Path, name: str = "qwen2.5-untied") -> Path:
    families.write(name, directory)
    return directory


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_weights_are_loaded_into_their_sharding(shape, tmp_path):
    directory = written(tmp_path)
    config = hf.read_config(directory)
    mesh = make_mesh(shape, config)
    shardings = sharding.param_shardings(config, mesh)
    sharded = hf.load(directory, jnp.float32, shardings)
    unsharded = hf.load(directory)
    same = lambda a, b, s: a.sharding == s and bool((np.asarray(a) == b).all())
    assert jax.tree.all(jax.tree.map(same, sharded, unsharded, shardings))


def test_tensors_are_read_one_at_a_time(tmp_path, monkeypatch):
    directory = written(tmp_path)
    alive, peaks = [], []
    real = hf.safe_open

    class Counted:
        def __init__(self, *arguments, **options):
            self.file = real(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            value = self.file.get_tensor(name)
            alive.append(value.nbytes)
            peaks.append(sum(alive))
            return value

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(hf, "safe_open", Counted)
    hf.load(directory, on_tensor=lambda name: alive.clear())
    largest = max(value.nbytes for value in tensors_of(directory).values())
    assert max(peaks) == largest


def spoil_missing(directory: Path) -> None:
    values = tensors_of(directory)
    del values["model.layers.1.mlp.up_proj.weight"], values["model.norm.weight"]
    save_file(values, directory / "model.safetensors")


def spoil_extra(directory: Path) -> None:
    values = tensors_of(directory) | {"model.extra": np.zeros(3, np.float32)}
    save_file(values, directory / "model.safetensors")


def spoil_shape(directory: Path) -> None:
    values = tensors_of(directory) | {"model.norm.weight": np.zeros(7, np.float32)}
    save_file(values, directory / "model.safetensors")


def spoil_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"no weights")


def spoil_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def spoil_index(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (directory / INDEX).write_text(json.dumps(index))


def spoil_value(value: Any) -> Callable[[Path], None]:
    """Put a value into one weight, in place or as the array."""

    def spoil(directory: Path) -> None:
        values = tensors_of(directory)
        if isinstance(value, np.ndarray):
            values["model.norm.weight"] = value
        else:
            values["model.norm.weight"][3] = value
        save_file(values, directory / "model.safetensors")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            spoil_missing,
            "missing model.layers.1.mlp.up_proj.weight; missing model.norm",
        ),
        (spoil_extra, "unknown model.extra"),
        (spoil_shape, r"model.norm.weight has shape \(7,\), expected \(32,\)"),
        (spoil_weights, "not a safetensors file"),
        (spoil_config, "config.json: not readable as JSON"),
        (spoil_index, "gone.safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            r"no model.safetensors .*convert them .*save_pretrained\(NEW\)$",
        ),
        (
            lambda d: (d / INDEX).write_text("{}"),
            f"has model.safetensors and {INDEX}; remove",
        ),
        (spoil_value(np.nan), "model.safetensors: model.norm.weight: has NaN"),
        (spoil_value(-np.inf), "model.safetensors: model.norm.weight: has NaN"),
        (spoil_value(np.zeros(32, np.int8)), "model.norm.weight has type I8, expected"),
    ],
)
def test_mismatched_weights_are_listed(spoil, message, tmp_path):
    directory = written(tmp_path)
    spoil(directory)
    with pytest.raises(InputError, match=message):
        hf.load(directory)


def lack_a_tensor(weight_map: dict[str, Any]) -> None:
    del weight_map["model.norm.weight"]


def name_another_shard(weight_map: dict[str, Any]) -> None:
    weight_map["model.norm.weight"] = weight_map["model.embed_tokens.weight"]


def name_no_file(weight_map: dict[str, Any]) -> None:
    weight_map["model.norm.weight"] = 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lack_a_tensor, "lacks model.norm.weight of {last}"),
        (
            name_another_shard,
            "lacks model.norm.weight of {last}; model.norm.weight is not in {first}",
        ),
        (name_no_file, "model.norm.weight: 3, expected the name of a file"),
    ],
)
def test_an_index_that_differs_from_its_shards_is_rejected(
    spoil, message, tmp_path, capsys
):
    directory = tmp_path / "start"
    families.write("qwen3", directory, max_shard_size="20KB")
    index = json.loads((directory / INDEX).read_text())
    weight_map = index["weight_map"]
    files = {
        "last": weight_map["model.norm.weight"],
        "first": weight_map["model.embed_tokens.weight"],
    }
    spoil(weight_map)
    (directory / INDEX).write_text(json.dumps(index))
    assert main(["convert", "from-hf", str(directory), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{directory / INDEX}: " in error and message.format(**files) in error
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_a_head_that_should_be_tied_is_never_dropped(tmp_path):
    families.write("qwen2-tied", tmp_path)
    values = tensors_of(tmp_path)
    params = hf.load(tmp_path)
    values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()
    save_file(values, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path), params)
    values["lm_head.weight"][5, 7] += 1
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight differs from .*embed_tokens"):
        hf.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_only_finite_weights_are_accepted(dtype):
    dtype = jnp.dtype(dtype)
    limits = jnp.finfo(dtype)
    finite = [limits.max, limits.min, limits.smallest_subnormal, -0.0, 0.0, 1.5]
    values = np.asarray(finite, dtype)
    hf.check_finite(values, "w")
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        spoiled = values.copy()
        spoiled[4] = bad
        with pytest.raises(InputError, match="w: has NaN or infinite values"):
            hf.check_finite(spoiled, "w")


def test_an_export_never_overwrites(tmp_path):
    directory = written(tmp_path / "start")
    params = hf.load(directory)
    before = tensors_of(directory)
    with pytest.raises(InputError, match="not an empty directory"):
        hf.save(params, hf.read_config(directory), directory)
    assert_same_bytes(before, tensors_of(directory))


def test_a_failed_import_leaves_nothing_behind(tmp_path):
    directory = written(tmp_path / "start")
    spoil_missing(directory)
    one_device = lambda config: make_mesh(MeshShape(), config, jax.devices()[:1])
    with pytest.raises(InputError, match="missing"):
        import_model(directory, tmp_path / "run", one_device, jnp.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_hugging_face_to_run_directory_and_back_changes_no_byte(tmp_path):
    start, run, end = (tmp_path / name for name in ("start", "run", "end"))
    families.write("qwen3", start)
    tokenizer().save_pretrained(str(start))
    mesh = lambda config: make_mesh(MeshShape(fsdp=4, tensor=2), config)
    import_model(start, run, mesh, jnp.float32)
    opened = open_model(run)
    params = opened.load(mesh(opened.config))
    hf.save(params, opened.config, end, source=opened.files)
    assert_same_bytes(tensors_of(start), tensors_of(end))
    assert set(hf.auxiliary_files(start)) == set(hf.auxiliary_files(end))


def test_stacking_on_the_devices_gives_the_same_weights(pair, tmp_path, monkeypatch):
    theirs, _, params = pair
    theirs.save_pretrained(tmp_path)
    monkeypatch.setattr(hf, "MAX_HOST_STACK_BYTES", 0)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path), params)
