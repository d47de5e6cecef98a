"""Small random models of every family, made by transformers, and their logits."""

from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}

FAMILIES = {
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2.5-untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2.5-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama3-tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
}


def make(name: str, seed: int = 0):
    """Return a random model whose norms and biases are not at their neutral start."""
    import torch  # takes seconds to import; most test files do not need it
    import transformers

    kind, extra = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **extra)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(name: str, directory: Path, **options):
    """Make a model and save it as a Hugging Face directory."""
    model = make(name)
    model.save_pretrained(directory, **options)
    return model


LENGTHS = (23, 9, 14)


def sequences(vocab: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocab, length) for length in LENGTHS]


def their_logits(theirs, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return theirs(torch.tensor(tokens)[None]).logits[0].numpy()


def close(ours, theirs) -> None:
    """Equal to 1e-4 relative to the scale of the logits."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def padded(rows: list[np.ndarray]):
    """Right-padded rows: tokens, positions, segments (0 is padding)."""
    S = max(map(len, rows))
    fill = lambda make: np.stack([np.pad(make(r), (0, S - len(r))) for r in rows])
    return (
        fill(lambda r: r),
        np.broadcast_to(np.arange(S), (len(rows), S)),
        fill(np.ones_like),
    )
