"""Downloads from the Hugging Face hub and uploads to it, through `huggingface_hub`.

Access tokens come from `hf auth login` or the variable HF_TOKEN.
"""

import contextlib
import errno
import fnmatch
import glob
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oreal_jax.errors import InputError, summarize
from oreal_jax.files import check_new_directory

# In the root of a repository only: subfolders hold the weights in other formats.
MODEL_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md")
DATA_FILES = ("*.parquet", "*.jsonl", "*.md")
LICENSES = ("LICENSE*", "NOTICE*")


class Download(NamedTuple):
    """A finished download; `kind` is "model" or "dataset"."""

    directory: Path
    kind: str
    files: list[str]
    commit: str


def fetch(
    repository: str, *, revision: str | None = None, output: Path | None = None
) -> Download:
    """Download the files of a model or data set that this project reads.

    The directory `output` (default: models/NAME or data/NAME) is created once all files
    are complete. An interrupted download leaves a hidden folder next to it, which the
    next call resumes.

    Raises:
        InputError: the repository cannot be read or has no such files, or the directory
            is not empty or cannot be written.
    """
    import huggingface_hub

    with explain_errors(repository, revision):
        kind, info = _find(repository, revision)
    names = [file.rfilename for file in info.siblings or []]
    files = (model_files if kind == "model" else data_files)(repository, names)
    if output is None:
        folder = "models" if kind == "model" else "data"
        output = Path(folder, repository.rpartition("/")[2])
    check_new_directory(output)
    target = output.resolve()
    scratch = target.with_name(f".{target.name}.{info.sha[:8]}.incomplete")
    with explain_errors(repository, revision):
        scratch.mkdir(parents=True, exist_ok=True)
        huggingface_hub.snapshot_download(
            repository,
            repo_type=kind,
            revision=info.sha,
            local_dir=scratch,
            allow_patterns=[glob.escape(name) for name in files],
        )
    # Without a connection, the client returns a folder that may be incomplete.
    if missing := [name for name in files if not (scratch / name).is_file()]:
        raise InputError(f"{repository}: {missing[0]} was not downloaded; try again")
    shutil.rmtree(scratch / ".cache", ignore_errors=True)  # the client's records
    scratch.rename(target)
    return Download(output, kind, files, info.sha)


def _find(repository: str, revision: str | None) -> tuple[str, Any]:
    """Return the kind of a repository and its metadata on the hub."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        return "model", api.model_info(repository, revision=revision)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        return "dataset", api.dataset_info(repository, revision=revision)


def model_files(repository: str, names: Sequence[str]) -> list[str]:
    """Return the files of a model that are needed.

    Raises:
        InputError: there are no safetensors.
    """
    top = [name for name in names if "/" not in name]
    files = _matching(top, MODEL_FILES)
    if not fnmatch.filter(files, "*.safetensors"):
        suffixes = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        others = [name for name in top if name.endswith(suffixes)]
        message = f"{repository}: the model has no model*.safetensors"
        raise InputError(message + (f", only {', '.join(others)}" if others else ""))
    return files


def data_files(repository: str, names: Sequence[str]) -> list[str]:
    """Return the files of a data set that are needed.

    Raises:
        InputError: there are no rows in a format that this project reads.
    """
    files = _matching(names, DATA_FILES)
    if all(name.endswith(".md") for name in files):
        raise InputError(f"{repository}: the data set has no parquet or jsonl files")
    return files


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    every = (*patterns, *LICENSES)
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in every)]


def create_repository(repository: str, *, private: bool) -> None:
    """Create a model repository unless it exists.

    Raises:
        InputError: it cannot be created.
    """
    from huggingface_hub import HfApi

    with explain_errors(repository):
        HfApi().create_repo(repository, private=private, exist_ok=True)


def upload(directory: Path, repository: str) -> str:
    """Upload the files of a directory in one commit; return its address.

    Raises:
        InputError: they cannot be uploaded.
    """
    from huggingface_hub import HfApi

    with explain_errors(repository):
        commit = HfApi().upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message="Export by oreal-jax",
        )
    return commit.commit_url


@contextlib.contextmanager
def explain_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Convert errors of the client to InputError with advice."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.HFValidationError:
        message = "not the name of a repository, expected OWNER/NAME"
    except errors.GatedRepoError:
        message = (
            f"gated: accept its terms at {hub}/{repository}, then run `hf auth login`"
        )
    except errors.RepositoryNotFoundError:
        message = f"not on {hub}, or private: run `hf auth login`"
    except errors.RevisionNotFoundError:
        message = f"has no revision {revision!r}"
    except errors.LocalTokenNotFoundError:
        message = f"{hub} requires a token: run `hf auth login`"
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        message = f"{hub} replied {summarize(error)}"
        if status in (401, 403):
            message = f"no permission on {hub} ({status}): `hf auth login` with a token"
    except Exception as error:  # of the file system, or of the client's HTTP client
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: cannot be written: {error.strerror}"
        else:
            message = f"{hub} cannot be reached: {summarize(error)}"
    else:
        return
    raise InputError(f"{repository}: {message}")
