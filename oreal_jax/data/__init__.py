"""Prompts with gold answers: sources, cleaning, order, chat templates, packing."""

# ruff: noqa: F401 (re-exports)
from oreal_jax.data.builder import build, load_prompts
from oreal_jax.data.chat import Chat, load_tokenizer
from oreal_jax.data.order import PUBLISHED_BANDS, PromptOrder, repeat_by_difficulty
from oreal_jax.data.prompts import (
    Prompt,
    SolvedQuestion,
    read_examples,
    read_judgements,
    read_prompts,
    read_questions,
)
