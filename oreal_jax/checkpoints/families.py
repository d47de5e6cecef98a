"""Hugging Face's config.json to `ModelConfig` and back: Qwen2, Qwen3 and Llama.

A value that this decoder does not compute is refused by name, never ignored.
"""

from typing import Any

from oreal_jax.errors import InputError
from oreal_jax.model.config import ModelConfig, Rope

FAMILIES = ("llama", "qwen2", "qwen3")

# Numbers of a rotary embedding.
NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
)  # fmt: skip
# Fields that must have these values, where present.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
}


def from_hugging_face(fields: dict[str, Any], where: str) -> ModelConfig:
    """The shape that a config.json describes; `where` names the file in messages.

    Raises:
        InputError: a field is missing, or has a value that is not supported.
    """
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"{where}: model_type={family!r} is not supported, "
            f"only {', '.join(FAMILIES)}"
        )
    required = dict(REQUIRED)
    # Qwen2 always has a bias there and does not say so.
    required["attention_bias"] = (False, None) if family != "qwen2" else (True, None)
    for name, supported in required.items():
        if fields.get(name) not in supported and name in fields:
            raise InputError(f"{where}: {name}={fields[name]!r} is not supported")
    kinds = fields.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise InputError(
            f"{where}: layer_types={fields['layer_types']!r} is not supported; "
            "only full_attention is"
        )

    def number(name: str, default: Any = None, kind: type = int) -> Any:
        value = fields.get(name, default)
        value = default if value is None else value
        is_one = isinstance(value, int | kind) and not isinstance(value, bool)
        if not is_one or value <= 0:
            what = "number" if kind is float else "whole number"
            raise InputError(f"{where}: {name}={value!r}, expected a positive {what}")
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
    """Reads `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`."""
    stretch = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(stretch, dict):
        raise InputError(f"{where}: rope_scaling={stretch!r}, expected an object")
    name = "partial_rotary_factor"
    if stretch.get(name) not in REQUIRED[name]:
        raise InputError(f"{where}: {name}={stretch[name]!r} is not supported")
    theta = stretch.get("rope_theta", fields.get("rope_theta"))
    theta = 10_000.0 if theta is None else theta
    for name, value in {"rope_theta": theta, **stretch}.items():
        is_number = isinstance(value, int | float) and value > 0
        if name in NUMBERS and value is not None and not is_number:
            raise InputError(f"{where}: {name}={value!r}, expected a positive number")
    kind = stretch.get("rope_type", stretch.get("type", "default"))
    known = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
        "yarn": {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "truncate",
        },
    }
    if kind not in known:
        raise InputError(
            f"{where}: rope_type={kind!r} is not supported ({', '.join(known)} are)"
        )
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    given = {k: v for k, v in stretch.items() if k not in common and v is not None}
    strange = given.keys() - known[kind]
    if strange and kind != "default":
        name = sorted(strange)[0]
        raise InputError(
            f"{where}: {name}={given[name]!r} is not supported with rope_type={kind!r}"
        )
    if kind == "default":
        return Rope(theta=float(theta))
    missing = {"factor"} if kind != "llama3" else known["llama3"]
    if missing - given.keys():
        name = sorted(missing - given.keys())[0]
        raise InputError(f"{where}: rope_type={kind!r} without {name}")
    original = given.pop("original_max_position_embeddings", max_length)
    return Rope(theta=float(theta), kind=kind, original_max_length=original, **given)


def to_hugging_face(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """A config.json for a model that was not imported from one."""
    if config.qk_norm:
        family, name = "qwen3", "Qwen3ForCausalLM"
    elif config.qkv_bias:
        family, name = "qwen2", "Qwen2ForCausalLM"
    else:
        family, name = "llama", "LlamaForCausalLM"
    rope, stretch = config.rope, None
    if rope.kind != "default":
        length = {"original_max_position_embeddings": rope.original_max_length}
        extra = {
            "linear": {},
            "llama3": length
            | {
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
            },
            "yarn": length
            | {
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "truncate": rope.truncate,
            }
            | (
                {"attention_factor": rope.attention_factor}
                if rope.attention_factor
                else {}
            ),
        }[rope.kind]
        stretch = {"rope_type": rope.kind, "factor": rope.factor} | extra
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
        "rope_scaling": stretch,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "dtype": dtype,
    }
