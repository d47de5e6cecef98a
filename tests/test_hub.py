"""Downloads from a stand-in for the Hugging Face hub, and uploads to it."""

import types
from pathlib import Path

import httpx
import hub_stub
import pytest
from huggingface_hub import HfApi, constants, errors
from test_export import write_run

from oreal_jax.cli import main
from oreal_jax.files import new_directory

MODEL = {
    "config.json": b"{}",
    "model-00001-of-00001.safetensors": b"weights",
    "model.safetensors.index.json": b'{"a": 1}',
    "tokenizer.json": b"[]",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ 1 }}",
    "LICENSE": b"Apache",
    "README.md": b"card",
}
OTHERS = {
    "pytorch_model.bin": b"weights again",
    "consolidated.safetensors": b"and again",
    "original/consolidated.00.pth": b"and again",
    "onnx/model.onnx": b"and again",
    "image.png": b"picture",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a hub, which the client uses, without tokens or bars."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with hub_stub.serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files of a folder, hidden ones too."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("oreal: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def test_the_needed_files_of_a_model_are_downloaded(hub, capsys):
    hub.models["owner/tiny-1.5"] = MODEL | OTHERS
    assert main(["fetch", "owner/tiny-1.5"]) == 0
    assert files(Path("models")) == {f"tiny-1.5/{k}": v for k, v in MODEL.items()}
    assert sorted(hub.downloads) == sorted(MODEL)
    output = capsys.readouterr().out
    assert f"wrote models/tiny-1.5: model at commit {hub_stub.COMMIT}" in output


def test_the_rows_of_a_data_set_are_downloaded_in_their_folders(hub):
    rows = {"main/train-0.parquet": b"1", "test.jsonl": b"2", "README.md": b"3"}
    hub.datasets["owner/sums"] = rows | {"old/train.zip": b"4"}
    assert main(["fetch", "owner/sums", "--output", "here/sums"]) == 0
    assert files(Path("here")) == {f"sums/{k}": v for k, v in rows.items()}


def test_a_revision_is_downloaded_by_its_name(hub, capsys):
    hub.models["owner/tiny"] = MODEL
    arguments = ["fetch", "owner/tiny", "--output", "a", "--revision"]
    assert main([*arguments, "other"]) == 2
    assert "owner/tiny: has no revision 'other'" in error(capsys)
    assert main([*arguments, hub_stub.COMMIT]) == 0
    assert files(Path("a")) == MODEL


def test_a_failed_download_leaves_no_model_and_continues(hub, capsys):
    hub.models["owner/tiny"] = MODEL
    hub.broken = {"tokenizer.json"}
    assert main(["fetch", "owner/tiny", "--output", "tiny"]) == 2
    assert "owner/tiny: " in error(capsys) and not Path("tiny").exists()
    hub.broken, before = set(), len(hub.downloads)
    assert main(["fetch", "owner/tiny", "--output", "tiny"]) == 0
    assert files(Path(".")) == {f"tiny/{k}": v for k, v in MODEL.items()}
    assert len(hub.downloads) - before < len(MODEL)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/none", "owner/none: not on {url}, or private: run `hf auth login`"),
        ("owner/gated", "owner/gated: gated: accept its terms at {url}/owner/gated"),
        ("owner/torch", "owner/torch: the model has no model*.safetensors, only py"),
        ("owner/images", "owner/images: the data set has no parquet or jsonl files"),
        ("a/b/c", "a/b/c: not the name of a repository, expected OWNER/NAME"),
    ],
)
def test_a_download_error_is_one_line(hub, name, message, capsys):
    hub.models = {"owner/gated": MODEL, "owner/torch": {"pytorch_model.bin": b""}}
    hub.datasets["owner/images"] = {"1.png": b"", "README.md": b""}
    hub.gated = {"owner/gated"}
    assert main(["fetch", name]) == 2
    assert message.format(url=hub.url) in error(capsys)
    assert not files(Path("."))


def test_a_hub_without_connection_is_named(hub, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert main(["fetch", "owner/tiny"]) == 2
    assert "owner/tiny: http://127.0.0.1:1 cannot be reached: " in error(capsys)


@pytest.mark.parametrize("is_dangling", [True, False])
def test_the_output_may_be_a_link_to_an_empty_directory(hub, is_dangling):
    hub.models["owner/tiny"] = MODEL
    if not is_dangling:
        Path("disk/models").mkdir(parents=True)
    Path("output").symlink_to("disk/models")
    assert main(["fetch", "owner/tiny", "--output", "output"]) == 0
    assert Path("output").is_symlink() and files(Path("disk/models")) == MODEL
    Path("other").symlink_to("disk/other")
    with new_directory(Path("other")) as scratch:
        (scratch / "file").touch()
    assert files(Path("disk/other")) == {"file": b""}


def test_a_mount_point_is_refused_before_the_download(hub, monkeypatch, capsys):
    hub.models["owner/tiny"] = MODEL
    Path("mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mounted")
    assert main(["fetch", "owner/tiny", "--output", "mounted"]) == 2
    assert "mounted: a mount point; name a new directory in it" in error(capsys)
    assert not hub.downloads


def test_a_directory_with_files_is_never_overwritten(hub, capsys):
    hub.models["owner/tiny"] = MODEL
    Path("tiny").mkdir()
    Path("tiny/mine").touch()
    assert main(["fetch", "owner/tiny", "--output", "tiny"]) == 2
    assert "tiny: exists and is not an empty directory" in error(capsys)
    assert not hub.downloads


# Uploads: the client's two calls are recorded.


@pytest.fixture
def calls(monkeypatch) -> list:
    """Return the calls of the client, which uploads nothing."""
    calls = []

    def create_repo(self, repository, **options):
        calls.append((repository, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        calls.append((repo_id, files(Path(folder_path))))
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


@pytest.mark.parametrize("private", [False, True])
def test_an_export_is_uploaded_with_its_model_card(
    start, tmp_path, calls, private, capsys
):
    run, end = write_run(start / "hf", tmp_path / "run"), tmp_path / "end"
    options = ["--push-to", "me/model", *(["--private"] if private else [])]
    assert main(["convert", "to-hf", str(run), str(end), *options]) == 0
    (first, created), (second, uploaded) = calls
    assert first == second == "me/model"
    assert created == {"private": private, "exist_ok": True}
    assert uploaded == files(end) and b"# end" in uploaded["README.md"]
    assert "uploaded as https://hub/me/model/commit/1" in capsys.readouterr().out


def refuse(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


def test_without_permission_nothing_is_converted(start, tmp_path, monkeypatch, capsys):
    response = httpx.Response(403, request=httpx.Request("POST", "https://hub"))
    refusal = errors.HfHubHTTPError("forbidden", response=response)  # pyright: ignore
    monkeypatch.setattr(HfApi, "create_repo", refuse(refusal))
    words = ["convert", "to-hf", str(start / "hf"), str(tmp_path / "end")]
    assert main([*words, "--push-to", "me/model"]) == 2
    assert "me/model: no permission on https://" in error(capsys)
    assert not (tmp_path / "end").exists()


def test_a_failed_upload_keeps_the_export(start, tmp_path, calls, monkeypatch, capsys):
    lost = ConnectionError("no route to host")
    monkeypatch.setattr(HfApi, "upload_folder", refuse(lost))
    words = ["convert", "to-hf", str(start / "hf"), str(tmp_path / "end")]
    assert main([*words, "--push-to", "me/model"]) == 2
    assert "cannot be reached: ConnectionError: no route" in error(capsys)
    assert (tmp_path / "end" / "config.json").is_file()


def test_an_invalid_upload_is_refused_before_anything_is_sent(
    start, tmp_path, calls, capsys
):
    words = ["convert", "to-hf", str(start / "hf"), str(tmp_path / "end")]
    assert main([*words, "--private"]) == 2
    assert "--private without --push-to" in error(capsys)
    (tmp_path / "end").mkdir()
    (tmp_path / "end" / "mine").touch()
    assert main([*words, "--push-to", "me/model"]) == 2
    assert "is not an empty directory" in error(capsys)
    assert not calls
