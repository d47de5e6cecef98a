"""The library: its names, and a model loaded, sampled, verified and saved in Python."""

import ast
import dataclasses
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import ROOT

import oreal_jax
from oreal_jax import trajectory
from oreal_jax.config_loading import load
from oreal_jax.errors import InputError
from oreal_jax.files import write_text
from oreal_jax.mesh import MeshShape

QUESTIONS = ["max 3 4?", "max 9 2?"]


@pytest.fixture(scope="module")
def model(start):
    """Return the tiny model on one device."""
    return oreal_jax.load_model(start / "hf", devices=jax.devices()[:1])


def test_importing_the_library_loads_neither_jax_nor_transformers():
    program = """
import sys, oreal_jax
assert not {"jax", "transformers", "numpy"} & sys.modules.keys()
oreal_jax.Verdict, oreal_jax.Pool, oreal_jax.verify_completions, oreal_jax.InputError
from oreal_jax import verify, train
assert not {"jax", "transformers"} & sys.modules.keys()
assert oreal_jax.losses.Oreal and oreal_jax.verify is verify
try:
    oreal_jax.load_models
except AttributeError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    expected = "module 'oreal_jax' has no attribute 'load_models'\n"
    assert (result.stdout, result.stderr) == (expected, "")


def test_every_public_name_has_a_docstring():
    assert sorted({*oreal_jax.MODULES, "losses"}) == sorted(oreal_jax.__all__)
    for name in oreal_jax.__all__:
        text = getattr(oreal_jax, name).__doc__
        # Dataclasses and named tuples without a docstring list their fields.
        assert text and not text.startswith(f"{name}("), name


def test_type_checkers_see_the_same_names():
    body = ast.parse(Path(oreal_jax.__file__).read_text()).body
    (block,) = [node for node in body if isinstance(node, ast.If)]
    imported = {
        alias.name: str(node.module).removeprefix("oreal_jax.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == oreal_jax.MODULES | {"losses": "oreal_jax"}


def test_completions_of_a_loaded_model_are_verified(model, shared_pool):
    engine = model.make_engine(rows=8)
    sampling = oreal_jax.Sampling(max_tokens=4)
    requests = [
        oreal_jax.Request(model.chat.encode(question), sampling, key)
        for key, question in enumerate(QUESTIONS)
    ]
    groups = engine.sample(engine.weights(model.params), requests, samples=2)
    candidates = [
        oreal_jax.Candidate(question, "4", model.chat.decode(completion.tokens))
        for question, group in zip(QUESTIONS, groups, strict=True)
        for completion in group
    ]
    verdicts = oreal_jax.verify_completions(candidates, shared_pool)
    outcomes = {verdict.outcome for verdict in verdicts}
    assert len(verdicts) == 4 and outcomes <= {"correct", "incorrect", "undecided"}


def test_a_saved_model_loads_again(model, tmp_path):
    model.save(tmp_path / "saved")
    again = oreal_jax.load_model(str(tmp_path / "saved"), devices=jax.devices()[:1])
    assert again.config == model.config
    pairs = zip(
        jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True
    )
    assert all(np.array_equal(*pair) for pair in pairs)


def test_the_mesh_and_the_dtype_can_be_chosen(start):
    shape = MeshShape(fsdp=2, tensor=2)
    model = oreal_jax.load_model(
        start / "hf", mesh=shape, devices=jax.devices()[:4], dtype="bfloat16"
    )
    assert dict(model.mesh.shape) == dataclasses.asdict(shape)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}


def test_the_system_prompt_of_a_run_is_used_unless_another_is_given(start, tmp_path):
    (tmp_path / "model").symlink_to(start / "hf")
    write_text(tmp_path / "config.json", '{"system_prompt": "Be brief."}')
    open_run = lambda **options: oreal_jax.load_model(
        tmp_path, devices=jax.devices()[:1], **options
    )
    assert open_run().chat.system_prompt == "Be brief."
    assert open_run(system_prompt="Be exact.").chat.system_prompt == "Be exact."


def test_a_missing_weight_is_reported_where_the_weights_are_needed(start, tmp_path):
    (tmp_path / "hf").mkdir()
    for path in (start / "hf").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "hf" / path.name).symlink_to(path)
    model = oreal_jax.load_model(tmp_path / "hf", devices=jax.devices()[:1])
    with pytest.raises(InputError, match="hf"):
        _ = model.params


def test_loaded_weights_are_released_with_the_model(start):
    model = oreal_jax.load_model(start / "hf", devices=jax.devices()[:1])
    reference = weakref.ref(jax.tree.leaves(model.params)[0])
    assert reference() is not None
    del model
    gc.collect()
    assert reference() is None


def test_a_preset_of_the_selection_keeps_its_old_name_in_config_files(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import oreal_jax\nfrom oreal_jax.trajectory import everything\n"
        "config = oreal_jax.TrainConfig(model='m', prompts='p', keep=everything)\n"
    )
    assert load(file, oreal_jax.TrainConfig).keep is trajectory.select_all
