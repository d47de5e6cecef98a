"""`oreal completion`: shells complete verbs, options and files."""

import shutil
import subprocess

import pytest

from oreal_jax.cli import main, parser

# Prints what bash would offer for the words of a command line.
COMPLETE = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_oreal "${{COMP_WORDS[0]}}" "${{COMP_WORDS[COMP_CWORD]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def offers(tmp_path, capsys):
    """`offers(words)`: what bash offers for the last of them."""
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "oreal.bash"
    script.write_text(capsys.readouterr().out)

    def complete(words: str) -> list[str]:
        text = COMPLETE.format(script=script, words=words)
        command = ["bash", "-c", text]
        return subprocess.check_output(command, text=True, cwd=tmp_path).split()

    return complete


def test_bash_completes_verbs_options_and_files(offers, tmp_path):
    verbs = parser()._subparsers._group_actions[0].choices  # pyright: ignore
    assert set(verbs or ()) <= set(offers("oreal ''"))
    assert offers("oreal conv") == ["convert"]
    assert offers("oreal convert to") == ["to-hf"]
    assert offers("oreal train --prof") == ["--profile"]
    assert offers("oreal convert to-hf --dtype f") == ["float32"]
    (tmp_path / "my_run.py").touch()
    assert offers("oreal train my_") == ["my_run.py"]
    assert offers("oreal sample --model my_") == ["my_run.py"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_has_every_verb(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in ("train", "to-hf", "pass-rate", "fetch"))
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
