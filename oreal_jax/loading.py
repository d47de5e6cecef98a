"""Models opened for use: architecture, mesh, chat template, weights and engines."""

import dataclasses
import datetime
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.sharding import Mesh

from oreal_jax import program_cache
from oreal_jax.checkpoints.export import export
from oreal_jax.checkpoints.source import ModelSource, open_model
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.data.chat import read_date
from oreal_jax.mesh import MeshShape, make_mesh, platform
from oreal_jax.model import ModelConfig, Params
from oreal_jax.sampling import Engine, make_stop_table

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model on a mesh, without its weights.

    `source` locates its files, `chat` holds its tokenizer and chat template, `dtype` is
    that of activations. Completions end at the chat's stop strings, and at `stop_words`
    in addition to the model's own stop tokens.
    """

    source: ModelSource
    mesh: Mesh
    dtype: Any
    chat: Chat
    stop_words: Sequence[str] = ()

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.source.config

    def make_engine(self, **options: Any) -> Engine:
        """Return an engine on this mesh; `options` are those of `Engine`: rows, ...

        Raises:
            InputError: an option or a stop word cannot be used with this model.
        """
        strings, token_bytes = self.chat.stop_strings, self.chat.token_bytes
        stop_tokens = self.chat.stop_tokens(self.stop_words)
        return Engine(
            self.config,
            self.mesh,
            stop_tokens,
            stop_table=make_stop_table(strings, token_bytes, self.config.vocab),
            # A checkpoint may name a stop token that its tokenizer lacks.
            real_tokens=max([self.chat.size, *(token + 1 for token in stop_tokens)]),
            dtype=self.dtype,
            **options,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel(OpenModel):
    """A model on a mesh, with its weights, which load in the background.

    An engine has its own copy: delete the model to free these.
    """

    loading: Future[Params]

    @property
    def params(self) -> Params:
        """The weights in `dtype`, sharded over the mesh; waits until they are loaded.

        Raises:
            InputError: a weight is missing or has another shape.
        """
        return self.loading.result()

    def save(self, directory: str | Path) -> None:
        """Write the model as a Hugging Face directory, in `dtype`.

        Raises:
            InputError: the directory is not empty or cannot be written.
        """
        export(self.source, self.params, Path(directory))


def load_model(
    directory: str | Path,
    *,
    step: int | None = None,
    mesh: MeshShape | None = None,
    devices: Sequence | None = None,
    dtype: str = "auto",
    system_prompt: str | None = None,
    chat_template: str | Path | None = None,
    template_vars: Mapping[str, Any] = {},
    date: datetime.date | None = None,
    stops: Sequence[str] = (),
) -> LoadedModel:
    """Load a Hugging Face or run directory onto devices.

    Returns as soon as the tokenizer is loaded; `LoadedModel.params` waits for the
    weights. For a run, `step` N is the policy after N steps (None: the newest), and
    RUN/reference is the initial one. `mesh` is how they are sharded over `devices`
    (None: fully, over all). `dtype` is that of weights and activations: "auto" is
    bfloat16, float32 on CPU.
    `system_prompt` None is the run's, else the chat template's own. `chat_template` is
    a Jinja file that replaces the model's; `template_vars` are its variables, in
    addition to the run's. `date` is the date that it prints, if any (None: the run's,
    else today's). Completions end before the first of `stops`, or at it if it is a
    special token.

    Raises:
        InputError: the directory has no usable model, tokenizer or template, or the
            devices do not fit the model.
    """
    source = open_model(directory, step)
    shape = mesh or MeshShape()
    placement = make_mesh(shape, source.config, devices)
    program_cache.enable()
    compute = compute_dtype(dtype, placement)
    # Importing the tokenizer's library takes about as long as loading the weights.
    loading = in_background(lambda: source.load(placement, compute))
    tokenizer = load_tokenizer(source.files)
    words = [text for text in stops if text in tokenizer.all_special_tokens]
    strings = [text for text in stops if text not in words]
    words += source.settings.get("stop_words", ())
    strings += source.settings.get("stop_strings", ())
    if system_prompt is None:
        system_prompt = source.settings.get("system_prompt")
    own = {} if chat_template else dict(source.settings.get("template_vars", ()))
    return LoadedModel(
        source=source,
        mesh=placement,
        dtype=compute,
        chat=Chat(
            tokenizer,
            system_prompt,
            Path(chat_template) if chat_template else None,
            strings,
            own | dict(template_vars),
            date or read_date(source.files),
        ),
        stop_words=words,
        loading=loading,
    )


def compute_dtype(name: str, mesh: Mesh):
    """Return the dtype of activations: "auto" is bfloat16, on CPU float32."""
    if name == "auto":
        name = "float32" if platform(mesh) == "cpu" else "bfloat16"
    return jnp.dtype(name)


def in_background(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread that does not keep the process alive.

    Nothing but the returned future refers to the result.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
