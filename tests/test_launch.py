"""The pod launcher, with a `gcloud` that writes down what it is asked."""

import os
import re
import subprocess
from pathlib import Path

import jax
import pytest

from oreal_jax.checkpoints.published import PUBLISHED
from oreal_jax.config import TrainConfig
from oreal_jax.config_loading import load
from oreal_jax.mesh import MeshShape, make_engine_meshes, make_mesh

ROOT = Path(__file__).parents[1]
NEEDED = ["--name", "run", "--zone", "here", "--nfs", "server:/share"]
CONFIG = ["--", "configs/oreal_7b.py", "--set", "system_prompt=a b"]

# Says what `states` hold, a line a time; the first `run` fails where told so.
GCLOUD = """#!/bin/bash
case "$*" in
  *describe*) head -n 1 states; sed -i 1d states ;;
  *) printf '%s\\n' "$3 $4" >> asked ;;
esac
case "$*" in
  *OREAL_PROCESSES=auto*) if [ -e fails ]; then rm fails; exit 1; fi ;;
esac
"""


def launch(home: Path, *words: str) -> subprocess.CompletedProcess:
    (home / "gcloud").write_text(GCLOUD)
    (home / "gcloud").chmod(0o755)
    (home / "git").write_text("#!/bin/sh\n")
    (home / "git").chmod(0o755)
    environment = os.environ | {"PATH": f"{home}:{os.environ['PATH']}", "PAUSE": "0"}
    return subprocess.run(
        [ROOT / "tools" / "launch_pod.sh", *words],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def asked(home: Path) -> list[str]:
    path = home / "asked"
    return path.read_text().splitlines() if path.exists() else []


def test_a_dry_run_prints_what_would_be_run_and_runs_nothing(tmp_path):
    done = launch(tmp_path, "up", *NEEDED, "--spot", "--dry-run", *CONFIG)
    assert done.returncode == 0 and not done.stderr and not asked(tmp_path)
    create, archive, copy, install, run, delete = done.stdout.splitlines()
    assert create == (
        "+ gcloud compute tpus queued-resources create run --zone=here --node-id=run "
        "--accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5 --spot"
    )
    assert "git archive" in archive and "tpu-vm scp" in copy
    assert "server:/share" in install and "--worker=all" in install
    command = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {run[2:]}"], capture_output=True, text=True
    ).stdout
    assert command.endswith(
        "--command=cd oreal-jax && OREAL_PROCESSES=auto .venv/bin/oreal train "
        "configs/oreal_7b.py --set system_prompt=a\\ b --run /mnt/oreal/runs/run\n"
    )
    assert delete.endswith("delete run --zone=here --force --quiet")


def test_a_slice_that_is_taken_away_is_asked_for_again(tmp_path):
    states = ["PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "ACTIVE"]
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "fails").touch()
    done = launch(tmp_path, "up", *NEEDED, *CONFIG)
    assert done.returncode == 0, done.stderr
    once = ["queued-resources create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
    assert asked(tmp_path) == [*once, "queued-resources delete"] * 2


def test_a_run_that_fails_by_itself_is_not_begun_again(tmp_path):
    (tmp_path / "states").write_text("ACTIVE\n" * 10)
    (tmp_path / "fails").touch()
    done = launch(tmp_path, "up", *NEEDED, *CONFIG)
    assert done.returncode == 1 and "not a preemption" in done.stderr
    assert asked(tmp_path).count("queued-resources create") == 1
    assert "queued-resources delete" not in asked(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no verb"),
        (["up"], "--name is missing"),
        (["create", "--name", "a"], "--zone is missing"),
        (["up", "--name", "a", "--zone", "z", *CONFIG], "--nfs is missing"),
        (["run", "--name", "a", "--zone", "z"], "no config behind --"),
        (["up", "configs/tiny.py"], "a config goes behind --"),
        (["fly", *NEEDED], "fly: no such verb"),
        (["up", "--fast"], "--fast: no such option"),
    ],
)
def test_bad_options_are_one_line(tmp_path, words, said):
    done = launch(tmp_path, *words)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", ["oreal_7b", "oreal_32b", "oreal_7b_dsr1"])
def test_a_task_under_slurm_has_the_devices_of_whole_engines(recipe):
    script = (ROOT / "tools" / "slurm.sh").read_text()
    given = dict(re.findall(r"^#SBATCH --(\S+?)=(\S+)", script, re.MULTILINE))
    gpus = int(given["gpus-per-node"]) // int(given["ntasks-per-node"])
    config = load(ROOT / "configs" / f"{recipe}.py", TrainConfig, [])
    shape = PUBLISHED[config.model]
    mesh = make_mesh(MeshShape(fsdp=8), shape)
    own = jax.devices()[:gpus]
    meshes = make_engine_meshes(mesh, shape, config.decode_tensor, own)
    assert meshes.own.shape["tensor"] == config.decode_tensor


@pytest.mark.parametrize("cpus", ["64", None])
def test_a_task_under_slurm_has_the_cpus_that_sbatch_asked_for(tmp_path, cpus):
    """Since SLURM 22.05 srun does not take them from sbatch's environment."""
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_CPUS_PER_TASK": cpus} if cpus else {}
    done = subprocess.run(
        ["bash", ROOT / "tools" / "slurm.sh", "a.py", "--set", "system_prompt=a b"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "--kill-on-bad-exit=0",
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        *[".venv/bin/oreal", "train", "a.py", "--set", "system_prompt=a b"],
    ]


def test_both_scripts_parse_and_the_launcher_explains_itself(tmp_path):
    for script in ("launch_pod.sh", "slurm.sh"):
        subprocess.run(["bash", "-n", ROOT / "tools" / script], check=True)
    assert "up        create, install, run" in launch(tmp_path, "--help").stdout
