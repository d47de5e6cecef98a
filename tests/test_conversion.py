"""Weights to and from Hugging Face format, byte for byte, and every way it can fail."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from make_tiny import tokenizer
from safetensors.numpy import load_file, save_file

from oreal_jax import model, sharding
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.gguf import pre_tokenizer, to_hugging_face_directory
from oreal_jax.checkpoints.source import import_model, open_model
from oreal_jax.cli import main
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.errors import InputError
from oreal_jax.mesh import MeshShape, make_mesh

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


def test_stacking_on_the_devices_gives_the_same_weights(pair, tmp_path, monkeypatch):
    theirs, _, params = pair
    theirs.save_pretrained(tmp_path)
    monkeypatch.setattr(hf, "MAX_HOST_STACK_BYTES", 0)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path), params)
