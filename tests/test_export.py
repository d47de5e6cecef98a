"""Exports: for transformers 4 and 5, with the stop tokens and the recipe of a run."""

import argparse
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import families
import jax
import jax.numpy as jnp
import make_tiny
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from test_model_config import edit

from oreal_jax import config
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.source import import_model, open_model
from oreal_jax.cli import main
from oreal_jax.cli.options import load_for_generation, model_options
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.errors import InputError
from oreal_jax.files import write_lines, write_text
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.sampling import Sampling


def write_run(
    start: Path, run: Path, stop_words: tuple[str, ...] = ("<|im_start|>",)
) -> Path:
    """Write a run directory as training with evaluations would."""
    one_device = lambda model: make_mesh(MeshShape(), model, jax.devices()[:1])
    import_model(start, run, one_device, jnp.float32)
    settings = config.TrainConfig(
        model="Qwen/Qwen2.5-7B",
        prompts="train.jsonl",
        system_prompt="Think.",
        stop_words=stop_words,
        stop_strings=("\n\n",),
        verification=config.Verification(judge_hosts=("http://judge:1/v1",)),
    )
    write_text(run / "config.json", json.dumps(config.as_json(settings)))
    scores = [{"step": step, "val-core/math/pass@1": 0.25 + step} for step in (0, 0.5)]
    write_lines(run / "evaluations.jsonl", scores)
    return run


def export(source: Path, destination: Path) -> Path:
    assert main(["convert", "to-hf", str(source), str(destination)]) == 0
    return destination


def test_an_export_of_a_run_has_its_stop_tokens_and_a_model_card(start, tmp_path):
    run = write_run(start / "hf", tmp_path / "run")
    exported = export(run, tmp_path / "exported")
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [256, 257]
    card = (exported / "README.md").read_text()
    for part in [
        "# exported\n",
        "`Qwen/Qwen2.5-7B` after 0 steps of reinforcement learning",
        "on `train.jsonl`",
        "\nThink.\n",
        '`"<|im_start|>"`, `"\\n\\n"`',
        "| steps | math/pass@1 |",
        "| 0.5 | 75.0% |",
        '"learning_rate": 5e-07',
    ]:
        assert part in card, part
    assert "judge:1" not in card
    plain = export(start / "hf", tmp_path / "plain")
    assert not (plain / "README.md").exists()


@pytest.mark.parametrize("text", ['Say "é\\n" 😀.', ""])
def test_an_export_of_a_run_has_its_system_prompt(start, tmp_path, text):
    run = write_run(start / "hf", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    write_text(run / "config.json", json.dumps(config | {"system_prompt": text}))
    exported = load_tokenizer(export(run, tmp_path / "exported"))
    of_run = load_tokenizer(run / "model")
    assert Chat(exported).encode("1?") == Chat(of_run, text).encode("1?")
    assert Chat(exported, "Own.").encode("1?") == Chat(of_run, "Own.").encode("1?")


def test_all_files_of_an_export_have_one_mode(start, tmp_path):
    source = Path(shutil.copytree(start / "hf", tmp_path / "source"))
    (source / "tokenizer.json").chmod(0o600)
    run = write_run(source, tmp_path / "run")
    modes = {p.stat().st_mode for p in export(run, tmp_path / "exported").iterdir()}
    assert len(modes) == 1 and modes != {0o100600}


def test_any_policy_of_a_run_can_be_chosen(start, tmp_path, capsys):
    run = write_run(start / "hf", tmp_path / "run")
    policies = run / "checkpoints"
    shutil.copytree(policies / "0" / "policy", policies / "7" / "policy")
    shutil.copytree(policies / "0" / "policy", run / "reference")
    newest, first = policies / "7" / "policy", policies / "0" / "policy"
    for source, weights, steps in [
        (open_model(run), newest, 7),
        (open_model(run, 0), first, 0),
        (open_model(policies / "0"), first, 0),
        (open_model(run / "reference"), run / "reference", 0),
    ]:
        assert (source.path, source.weights, source.steps) == (run, weights, steps)
        assert source.settings["system_prompt"] == "Think."
    first_export = tmp_path / "exported"
    words = ["convert", "to-hf", str(run), str(first_export), "--step"]
    assert main([*words, "3"]) == 2
    message = f"{run}: no checkpoint 3; available: 0, 7"
    assert message in capsys.readouterr().err and not first_export.exists()
    assert main([*words, "0"]) == 0
    assert "after 0 steps" in (first_export / "README.md").read_text()
    with pytest.raises(InputError, match="no checkpoint 1; available: none"):
        open_model(start / "hf", 1)


def test_completions_of_a_run_end_at_its_stop_words_and_strings(start, tmp_path):
    parser = argparse.ArgumentParser()
    model_options(parser)
    run = write_run(start / "hf", tmp_path / "run")
    args = parser.parse_args(["--model", str(run), "--rows", "8"])
    model, engine = load_for_generation(args, Sampling(max_tokens=6), stops=["!"])
    assert {256, 257} <= set(engine.stops.tokens.tolist())
    assert set(model.chat.stop_strings) == {"!", "\n\n"}
    assert model.chat.system_prompt == "Think."


@pytest.mark.parametrize("name", ["qwen2.5-yarn", "llama3-tied"])
def test_an_export_has_names_of_transformers_4(name, tmp_path):
    start = tmp_path / "start"
    families.write(name, start)
    tokenizer = make_tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(str(start))
    fields = json.loads((start / "config.json").read_text())
    assert "rope_parameters" in fields and "torch_dtype" not in fields
    end = export(start, tmp_path / "end")
    fields = json.loads((end / "config.json").read_text())
    assert fields["torch_dtype"] == fields["dtype"] == "float32"
    assert "rope_parameters" not in fields and fields["rope_theta"] == 10_000.0
    expected = families.FAMILIES[name][1]["rope_parameters"]
    assert expected.items() <= {**fields["rope_scaling"], "rope_theta": 1e4}.items()
    fields = json.loads((end / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in fields


READ = """
    import json, sys
    import torch, transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert transformers.__version__.startswith("4.57."), transformers.__version__
    results = []
    for directory in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokens = torch.arange(90)[None]
        with torch.no_grad():
            logits = model(tokens).logits[0].tolist()
            start = tokens[:, :9]
            completion = model.generate(start, max_new_tokens=24, do_sample=False)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "1 < 2?"}], add_generation_prompt=True
        )
        dtype = str(model.dtype)
        results.append([logits, completion[0].tolist(), prompt, dtype])
    print(json.dumps(results))
"""


@pytest.mark.slow
def test_transformers_4_reads_exports_with_the_same_logits_and_stops(tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "transformers==4.57.*"]
    subprocess.run(install, check=True, timeout=600)
    # torch is that of this environment, whose packages come after the new ones.
    (site,) = environment.glob("lib/python*/site-packages")
    write_text(site / "torch.pth", str(Path(torch.__file__).parents[1]) + "\n")
    prompt, expected, directories = torch.arange(90)[None], [], []
    for name in ("qwen2.5-yarn", "qwen3", "llama3-tied", "llama-linear"):
        start, run = tmp_path / name / "start", tmp_path / name / "run"
        families.write(name, start)
        make_tiny.tokenizer().save_pretrained(str(start))
        # The byte tokenizer has more tokens than the models of `families`.
        values = load_file(start / "model.safetensors")
        for key, value in values.items():
            if "embed_tokens" in key or "lm_head" in key:
                values[key] = np.concatenate([value, np.zeros((168, 32), value.dtype)])
        save_file(values, start / "model.safetensors")
        edit(start, vocab_size=264)
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(start).eval()
        with torch.no_grad():
            logits = theirs(prompt).logits[0].numpy()
            free = theirs.generate(
                prompt[:, :9], max_new_tokens=24, do_sample=False, eos_token_id=[256]
            )[0].tolist()
        # A stop word that greedy decoding meets.
        word = str(make_tiny.tokenizer().decode([free[12]]))
        (stop,) = make_tiny.tokenizer().encode(word, add_special_tokens=False)
        assert stop == free[12]
        end = 9 + free[9:].index(stop) + 1
        directory = tmp_path / name / "end"
        directories.append(export(write_run(start, run, (word,)), directory))
        expected.append((logits, free[:end]))
    script = textwrap.dedent(READ)
    output = subprocess.run(
        [python, "-c", script, *directories],
        check=True,
        stdout=subprocess.PIPE,
        timeout=300,
    ).stdout
    chat = Chat(make_tiny.tokenizer(), "Think.").encode("1 < 2?")
    results = json.loads(output)
    for (logits, tokens), result in zip(expected, results, strict=True):
        their_logits, their_tokens, their_chat, dtype = result
        families.close(np.asarray(their_logits), logits)
        assert (their_tokens, their_chat, dtype) == (tokens, chat, "torch.float32")
    assert hf.auxiliary_files(directories[0])
