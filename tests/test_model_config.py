"""config.json of Hugging Face directories: what is read, what is rejected."""

import json
from pathlib import Path

import families
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from families import LLAMA3, close, their_logits

from oreal_jax import model
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.families import from_hugging_face
from oreal_jax.errors import InputError

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SMOLLM2_135M = {
    "_name_or_path": "trl/sft",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.04,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def edit(directory: Path, **fields) -> Path:
    """Change fields of a config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def our_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    config, params = hf.read_config(directory), hf.load(directory)
    row = jnp.asarray(tokens)[None]
    positions = jnp.arange(row.shape[1])[None]
    states = model.hidden(config, params, row, positions, jnp.ones_like(row))
    return np.asarray(model.logits(config, params, states)[0])


def test_rope_scaling_replaces_rope_parameters_as_in_transformers(tmp_path):
    """The card of Qwen2.5 extends the context by adding `rope_scaling`."""
    families.write("qwen2.5-untied", tmp_path)
    tokens = np.arange(90)
    plain = our_logits(tmp_path, tokens)
    edit(tmp_path, rope_scaling=YARN)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = their_logits(theirs, tokens)
    close(our_logits(tmp_path, tokens), expected)
    assert np.abs(plain - expected).max() > 1e-3


@pytest.mark.parametrize("fields", [QWEN2_5_7B, SMOLLM2_135M])
def test_published_configs_are_read(fields):
    config = from_hugging_face(fields, "config.json")
    assert config.vocab == fields["vocab_size"]
    assert config.rope.theta == fields["rope_theta"]


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_every_field_that_transformers_writes_is_known(family):
    config = getattr(transformers, f"{family}Config")()
    assert from_hugging_face(config.to_dict(), "config.json")


@pytest.mark.parametrize("positions", [32_768, 131_072])
def test_yarn_multiplies_the_original_length(positions):
    scaling = {**YARN, "original_max_position_embeddings": 32_768}
    fields = {**QWEN2_5_7B, "max_position_embeddings": positions}
    config = from_hugging_face({**fields, "rope_scaling": scaling}, "config.json")
    assert config.max_length == 131_072
    assert from_hugging_face(fields, "config.json").max_length == positions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_tetha": 1e6}, "unknown field rope_tetha=1000000.0"),
        ({"is_llama_config": True}, "unknown field is_llama_config=True"),
        ({"use_mrope": True}, "use_mrope=True is not supported"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false', expected"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan, expected a positive"),
        ({"rope_theta": True}, "rope_theta=True, expected a positive number"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters: full_attention={'rope_theta': 1000000.0} is not",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "factor": 2.0}},
            "rope_parameters: factor=2.0 is not supported with rope_type='default'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
            "rope_scaling: beta_fast=32 is not supported with rope_type='linear'",
        ),
        (
            {"rope_scaling": {**YARN, "truncate": "false"}},
            "rope_scaling: truncate='false', expected true or false",
        ),
        (
            {"rope_scaling": {**YARN, "rope_type": "linear"}},
            "rope_scaling: rope_type='linear' and 'yarn' is not supported",
        ),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "rope_scaling: low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type=\\['yarn'\\] is not"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: factor=None, expected"),
        (
            {
                "rope_theta": None,
                "rope_scaling": YARN,
                "rope_parameters": {"rope_theta": 1e6},
            },
            "whose rope_theta=1000000.0 would become 10000.0",
        ),
    ],
)
def test_unknown_fields_and_values_are_named(fields, message):
    with pytest.raises(InputError, match=f"^config.json: .*{message}") as caught:
        from_hugging_face({**QWEN2_5_7B, **fields}, "config.json")
    assert "\n" not in str(caught.value)
