"""Export of models to Hugging Face directories; of a run with its recipe and scores."""

import json
from pathlib import Path

from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.source import ModelSource
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.files import new_directory, read_json, read_rows, write_text
from oreal_jax.model import Params

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [oreal-jax]
---

# {name}

`{model}` after {steps} steps of {method} on `{data}`, trained with oreal-jax.

{prompting}

## Evaluation

{evaluation}

## Recipe

```json
{recipe}
```
"""


def export(
    source: ModelSource,
    params: Params,
    directory: Path,
    *,
    max_shard_size: int = 5 * 10**9,
    on_tensor: hf.OnTensor = hf.ignore,
) -> None:
    """Write the model of `source` with the weights `params`.

    For a run, generation_config.json has the stop tokens, the chat template adds the
    system prompt, and README.md is a model card.

    Raises:
        InputError: the directory is not empty or cannot be written, or the tokenizer
            cannot be used.
    """
    with new_directory(directory) as scratch:
        hf.save(
            params,
            source.config,
            scratch,
            source=source.files,
            max_shard_size=max_shard_size,
            on_tensor=on_tensor,
        )
        if source.settings:
            path = scratch / "generation_config.json"
            fields = read_json(path) if path.is_file() else {}
            chat = Chat(load_tokenizer(source.files))
            stops = chat.stop_tokens(source.settings.get("stop_words", ()))
            hf.write_json(path, fields | {"eos_token_id": list(stops)})
            if (text := source.settings.get("system_prompt")) is not None:
                _add_system_prompt(scratch, chat.tokenizer.chat_template, text)
            write_text(scratch / "README.md", model_card(source, directory.name))


def _add_system_prompt(directory: Path, template: str, system_prompt: str) -> None:
    """Make the chat template add a system message to conversations without one."""
    content = json.dumps(system_prompt, ensure_ascii=False)
    # Both are read with `trim_blocks`: the line break is not printed.
    template = (
        "{%- if messages[0]['role'] != 'system' %}{%- set messages = "
        f"[{{'role': 'system', 'content': {content}}}] + messages %}}{{%- endif %}}\n"
        f"{template}"
    )
    write_text(directory / "chat_template.jinja", template)
    path = directory / "tokenizer_config.json"  # older versions of transformers read it
    fields = read_json(path) if path.is_file() else {}
    if "chat_template" in fields:
        hf.write_json(path, fields | {"chat_template": template})


def model_card(source: ModelSource, name: str) -> str:
    """Return the README.md of an exported run: base model, data, scores, settings."""
    settings = dict(source.settings)
    if "verification" in settings:  # without the addresses of a judge
        settings["verification"] = dict(settings["verification"], judge_hosts=[])
    loss = settings.get("loss")
    loss = loss["class"] if isinstance(loss, dict) else loss
    kind = "reinforcement learning" if "prompts" in settings else "fine-tuning"
    prompting = "Prompts are formatted by the chat template"
    if settings.get("system_prompt") is not None:
        prompting += (
            f" with this system message:\n\n```\n{settings['system_prompt']}\n```"
        )
    else:
        prompting += "."
    stops = [*settings.get("stop_words", ()), *settings.get("stop_strings", ())]
    if stops:
        text = ", ".join(f"`{json.dumps(stop, ensure_ascii=False)}`" for stop in stops)
        prompting += f"\n\nCompletions end at {text}."
    return CARD.format(
        name=name,
        model=settings["model"],
        steps=source.steps,
        method=f"{kind} (loss `{loss}`)",
        data=settings.get("prompts", settings.get("examples")),
        prompting=prompting,
        evaluation=_evaluation_table(source.path),
        recipe=json.dumps(settings, indent=2, ensure_ascii=False),
    )


def _evaluation_table(run: Path) -> str:
    """Return the scores of a run's evaluations as a Markdown table."""
    # RUN/best is a run directory whose evaluations are those of RUN.
    files = [folder / "evaluations.jsonl" for folder in (run, run.parent)]
    path = next((file for file in files if file.is_file()), None)
    if not path:
        return "Not evaluated during training."
    rows = [row for _, row in read_rows(path)]
    names = [name for name in rows[-1] if name.startswith("val-core/")]
    cells = [
        ["steps", *(name.removeprefix("val-core/") for name in names)],
        ["---"] * (1 + len(names)),
    ]
    for row in rows:
        scores = (f"{row[name]:.1%}" if name in row else "" for name in names)
        cells.append([str(row["step"]), *scores])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
