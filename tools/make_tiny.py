"""The tiny model of configs/tiny.py: random weights, a byte tokenizer, a task.

python tools/make_tiny.py DIRECTORY
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from oreal_jax import hardware

hardware.hide_absent_devices()  # before what follows imports JAX

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oreal_jax import model
from oreal_jax.checkpoints import hf
from oreal_jax.errors import InputError
from oreal_jax.model import ModelConfig

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'][0] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a\n{% endif %}"
)
CONFIG = ModelConfig(
    vocab=264,
    embed=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=128,
    qkv_bias=True,
    tied=True,
    max_length=256,
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte and two for the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=TEMPLATE,
    )


def write(directory: Path, seed: int = 0) -> None:
    """Write `hf` (a Hugging Face directory), `prompts.jsonl` and `solutions.jsonl`.

    The solutions have the format of an answer, and a random one of the two digits.
    """
    directory.mkdir(parents=True, exist_ok=True)
    hf.save(model.init(CONFIG, jax.random.key(seed)), CONFIG, directory / "hf")
    tokenizer().save_pretrained(str(directory / "hf"))
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10) for b in range(10)]
    question = lambda a, b: f"max {a} {b}?"
    prompts = [
        {"id": f"{a}-{b}", "question": question(a, b), "gold_answer": str(max(a, b))}
        for a, b in pairs
    ]
    solutions = [
        {"question": question(a, b), "solution": f"{rng.choice([a, b])}"}
        for a, b in pairs * 4
    ]
    for name, rows in [("prompts", prompts), ("solutions", solutions)]:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("directory", type=Path, help="directory to write to")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model to the directory on the command line."""
    args = parser().parse_args(arguments)
    try:
        write(args.directory)
    except InputError as error:
        parser().error(str(error))


if __name__ == "__main__":
    main()
