"""Conversion of Hugging Face's config.json to `ModelConfig` and back.

The families are Qwen2, Qwen3 and Llama. Fields that are unknown, and values that the
decoder does not support, are rejected by name.
"""

import math
from typing import Any

from oreal_jax.errors import InputError
from oreal_jax.model.config import ModelConfig, Rope

# The families, each with its fields that have no effect on logits.
FAMILIES: dict[str, set[str]] = {
    "llama": {"is_llama_config"},
    "qwen2": {"sliding_window", "max_window_layers"},  # used by use_sliding_window
    "qwen3": {"sliding_window", "max_window_layers"},
}
# Fields of any family that have no effect on logits: where a model comes from, how it
# was trained, defaults of generation, options of transformers.
IGNORED = """
    _name_or_path name_or_path _commit_hash architectures transformers_version
    transformers.js_config unsloth_fixed unsloth_version tokenizer_class dtype
    torch_dtype use_bfloat16 torchscript attn_implementation _attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled
    attention_dropout initializer_range gradient_checkpointing
    finetuning_task problem_type task_specific_params
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix
    use_cache max_length max_new_tokens min_length do_sample early_stopping num_beams
    num_beam_groups num_return_sequences temperature top_k top_p min_p typical_p
    repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids forced_bos_token_id forced_eos_token_id
    suppress_tokens begin_suppress_tokens exponential_decay_length_penalty
    remove_invalid_values return_dict return_dict_in_generate output_scores
    output_attentions output_hidden_states chunk_size_feed_forward is_decoder
    tie_encoder_decoder id2label label2id num_labels
"""
OFF = (False, None)
# The only supported values of these fields, where present.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": OFF,
    "use_mrope": OFF,
    "mlp_bias": OFF,
    "rope_interleaved": OFF,
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "is_encoder_decoder": OFF,
    "add_cross_attention": OFF,
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
}
ORIGINAL_LENGTH = "original_max_position_embeddings"
# The parameters of each `rope_type`. Those of llama3 have no defaults, the others need
# only `factor`.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", ORIGINAL_LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", ORIGINAL_LENGTH, "beta_fast", "beta_slow", "truncate")
    + ("attention_factor",),
}


def from_hugging_face(fields: dict[str, Any], where: str) -> ModelConfig:
    """Return the model shape of a config.json; `where` names the file in messages.

    Raises:
        InputError: a field is missing, unknown or has an unsupported value.
    """
    remaining = dict(fields)  # without those that have been read
    family = remaining.pop("model_type", None)
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{where}: model_type={family!r} is not supported, "
            f"only {', '.join(FAMILIES)}"
        )
    # Qwen2 always has these biases; its config.json has no field for them.
    bias = OFF if family != "qwen2" else (True, None)
    for name, supported in {**SUPPORTED, "attention_bias": bias}.items():
        if name in remaining and (value := remaining.pop(name)) not in supported:
            raise InputError(f"{where}: {name}={value!r} is not supported")
    layers = remaining.pop("layer_types", None) or []
    if not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}:
        raise InputError(
            f"{where}: layer_types={layers!r} is not supported; only full_attention is"
        )
    tied = remaining.pop("tie_word_embeddings", None)
    if not isinstance(tied, bool | None):
        raise InputError(
            f"{where}: tie_word_embeddings={tied!r}, expected true or false"
        )

    def number(name: str, default: int | None = None) -> Any:
        return _take_number(remaining, name, where, default)

    heads, embed = number("num_attention_heads"), number("hidden_size")
    length = number("max_position_embeddings")
    rope = _take_rope(remaining, length, where)
    if rope.kind == "yarn":  # the length after stretching, whatever the other field is
        length = int(rope.factor * rope.original_max_length)
    config = ModelConfig(
        vocab=number("vocab_size"),
        embed=embed,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", 128 if family == "qwen3" else embed // heads),
        mlp=number("intermediate_size"),
        rope=rope,
        norm_epsilon=_take_number(remaining, "rms_norm_eps", where, kind=float),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=bool(tied),
        max_length=length,
    )
    for name in sorted(remaining.keys() - {*IGNORED.split()} - FAMILIES[family]):
        raise InputError(
            f"{where}: unknown field {name}={remaining[name]!r}; if it does not change "
            "the model, remove it"
        )
    return config


def _take_number(
    fields: dict[str, Any],
    name: str,
    where: str,
    default: int | float | None = None,
    kind: type = int,
) -> Any:
    """Remove a positive number from `fields` and return it."""
    value: Any = fields.pop(name, None)
    if value is None:
        value = default
    is_number = isinstance(value, int | kind) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        expected = "number" if kind is float else "whole number"
        raise InputError(f"{where}: {name}={value!r}, expected a positive {expected}")
    return value


def _take_rope(fields: dict[str, Any], max_length: int, where: str) -> Rope:
    """Remove `rope_theta`, `rope_scaling` and transformers 5's `rope_parameters`.

    Where both are present, transformers reads `rope_scaling` and drops the other.
    """
    values = {}
    for name in ("rope_parameters", "rope_scaling"):
        values[name] = fields.pop(name, None) or {}
        if not isinstance(values[name], dict):
            raise InputError(f"{where}: {name}={values[name]!r}, expected an object")
    name = "rope_scaling" if values["rope_scaling"] else "rope_parameters"
    dropped = values["rope_parameters"] if name == "rope_scaling" else {}
    entries = {"rope_theta": fields.pop("rope_theta", None), **values[name]}
    entries = {key: value for key, value in entries.items() if value is not None}
    number = lambda key, default=None: _take_number(
        entries, key, f"{where}: {name}", default, float
    )
    theta = float(number("rope_theta", 10_000.0))
    if (dropped.get("rope_theta") or theta) != theta:
        raise InputError(
            f"{where}: rope_scaling replaces rope_parameters, whose rope_theta="
            f"{dropped['rope_theta']!r} would become {theta}; add rope_theta to "
            "rope_scaling and remove rope_parameters"
        )
    kinds = [entries.pop(key) for key in ("rope_type", "type") if key in entries]
    kind, *others = kinds or ["default"]
    if kind not in [*ROPE_FIELDS] or others not in ([], [kind]):
        raise InputError(
            f"{where}: {name}: rope_type={' and '.join(map(repr, kinds))} is not "
            f"supported ({', '.join(ROPE_FIELDS)} are)"
        )
    if entries.get("partial_rotary_factor") == 1:
        entries.pop("partial_rotary_factor")
    for key in sorted(entries.keys() - {*ROPE_FIELDS[kind]}):
        raise InputError(
            f"{where}: {name}: {key}={entries[key]!r} is not supported with "
            f"rope_type={kind!r}"
        )
    if kind == "default":
        return Rope(theta=theta)
    truncate = entries.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise InputError(
            f"{where}: {name}: truncate={truncate!r}, expected true or false"
        )
    required = ROPE_FIELDS[kind] if kind == "llama3" else ("factor",)
    own = {key: float(number(key)) for key in sorted({*required, *entries})}
    if kind == "llama3" and own["low_freq_factor"] >= own["high_freq_factor"]:
        raise InputError(
            f"{where}: {name}: low_freq_factor={own['low_freq_factor']} must be below "
            f"high_freq_factor={own['high_freq_factor']}"
        )
    return Rope(
        theta=theta,
        kind=kind,
        original_max_length=int(own.pop(ORIGINAL_LENGTH, max_length)),
        truncate=truncate,
        **own,
    )


def rope_fields(rope: Rope) -> dict[str, Any]:
    """Return the fields of rotary embedding that transformers 4 and 5 both read."""
    scaling = None
    if rope.kind != "default":
        values = {**vars(rope), ORIGINAL_LENGTH: rope.original_max_length}
        scaling = {"rope_type": rope.kind}
        scaling |= {name: values[name] for name in ROPE_FIELDS[rope.kind]}
        if not rope.attention_factor:
            scaling.pop("attention_factor", None)
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Return a config.json without type, for a model that was not imported from one."""
    if config.qk_norm:
        family, name = "qwen3", "Qwen3ForCausalLM"
    elif config.qkv_bias:
        family, name = "qwen2", "Qwen2ForCausalLM"
    else:
        family, name = "llama", "LlamaForCausalLM"
    return {
        "architectures": [name],
        "model_type": family,
        "vocab_size": config.vocab,
        "hidden_size": config.embed,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        **rope_fields(config.rope),
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
    }
