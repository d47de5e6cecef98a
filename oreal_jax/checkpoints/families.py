"""Hugging Face's config.json to `ModelConfig` and back: Qwen2, Qwen3 and Llama.

Values that the decoder does not support are rejected by name, never ignored.
"""

from typing import Any

from oreal_jax.errors import InputError
from oreal_jax.model.config import ModelConfig, Rope

FAMILIES = ("llama", "qwen2", "qwen3")

# The only supported values of these fields, where present.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
}
ORIGINAL_LENGTH = "original_max_position_embeddings"
# The parameters of each `rope_type`; those of llama3 have no defaults.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", ORIGINAL_LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", ORIGINAL_LENGTH, "beta_fast", "beta_slow", "truncate")
    + ("attention_factor",),
}
ROPE_NUMBERS = {"rope_theta", *ROPE_FIELDS["llama3"], *ROPE_FIELDS["yarn"]}
ROPE_NUMBERS -= {"truncate"}


def from_hugging_face(fields: dict[str, Any], where: str) -> ModelConfig:
    """Return the model shape of a config.json; `where` names the file in messages.

    Raises:
        InputError: a field is missing or has an unsupported value.
    """
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"{where}: model_type={family!r} is not supported, "
            f"only {', '.join(FAMILIES)}"
        )
    # Qwen2 always has biases, without saying so.
    bias = (False, None) if family != "qwen2" else (True, None)
    for name, supported in {**SUPPORTED, "attention_bias": bias}.items():
        if fields.get(name) not in supported and name in fields:
            raise InputError(f"{where}: {name}={fields[name]!r} is not supported")
    layers = fields.get("layer_types") or []
    if not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}:
        raise InputError(
            f"{where}: layer_types={layers!r} is not supported; only full_attention is"
        )

    def number(name: str, default: Any = None, kind: type = int) -> Any:
        value = fields.get(name)
        value = default if value is None else value
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        if not is_number or value <= 0:
            expected = "number" if kind is float else "whole number"
            raise InputError(
                f"{where}: {name}={value!r}, expected a positive {expected}"
            )
        return value

    heads, embed = number("num_attention_heads"), number("hidden_size")
    return ModelConfig(
        vocab=number("vocab_size"),
        embed=embed,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", 128 if family == "qwen3" else embed // heads),
        mlp=number("intermediate_size"),
        rope=_rope(fields, number("max_position_embeddings"), where),
        norm_epsilon=number("rms_norm_eps", kind=float),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=bool(fields.get("tie_word_embeddings", False)),
        max_length=number("max_position_embeddings"),
    )


def _rope(fields: dict[str, Any], max_length: int, where: str) -> Rope:
    """Read `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise InputError(f"{where}: rope_scaling={scaling!r}, expected an object")
    scaling = {"rope_theta": fields.get("rope_theta"), **scaling}
    scaling = {name: value for name, value in scaling.items() if value is not None}
    for name, value in scaling.items():
        is_number = isinstance(value, int | float) and value > 0
        if name in ROPE_NUMBERS and not is_number:
            raise InputError(f"{where}: {name}={value!r}, expected a positive number")
        if name == "partial_rotary_factor" and value != 1:
            raise InputError(f"{where}: {name}={value!r} is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_FIELDS:
        raise InputError(
            f"{where}: rope_type={kind!r} is not supported "
            f"({', '.join(ROPE_FIELDS)} are)"
        )
    theta = float(scaling.get("rope_theta", 10_000.0))
    if kind == "default":
        return Rope(theta=theta)
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    own = {name: value for name, value in scaling.items() if name not in common}
    for name in sorted(own.keys() - {*ROPE_FIELDS[kind]}):
        raise InputError(
            f"{where}: {name}={own[name]!r} is not supported with rope_type={kind!r}"
        )
    required = ROPE_FIELDS[kind] if kind == "llama3" else ["factor"]
    for name in sorted({*required} - own.keys()):
        raise InputError(f"{where}: rope_type={kind!r} without {name}")
    original = own.pop(ORIGINAL_LENGTH, max_length)
    return Rope(theta=theta, kind=kind, original_max_length=original, **own)


def to_hugging_face(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return a config.json for a model that was not imported from one."""
    if config.qk_norm:
        family, name = "qwen3", "Qwen3ForCausalLM"
    elif config.qkv_bias:
        family, name = "qwen2", "Qwen2ForCausalLM"
    else:
        family, name = "llama", "LlamaForCausalLM"
    rope, scaling = config.rope, None
    if rope.kind != "default":
        values = {**vars(rope), ORIGINAL_LENGTH: rope.original_max_length}
        scaling = {"rope_type": rope.kind}
        scaling |= {name: values[name] for name in ROPE_FIELDS[rope.kind]}
        if not rope.attention_factor:
            scaling.pop("attention_factor", None)
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
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "dtype": dtype,
    }
