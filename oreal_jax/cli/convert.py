"""`oreal convert`: weights from and to Hugging Face format."""

import argparse
from pathlib import Path

from oreal_jax.cli.options import Verb, step_option
from oreal_jax.errors import InputError
from oreal_jax.files import check_new_directory


def add(verb: Verb) -> None:
    """Add both directions to `oreal convert`."""
    for name, call, help in [
        (
            "from-hf",
            from_hf,
            "a Hugging Face directory or .gguf file to a run directory",
        ),
        ("to-hf", to_hf, "a model or run directory to a Hugging Face directory"),
    ]:
        command = verb(name, call, help, f"oreal convert {name} SRC DST")
        command.add_argument("source", type=Path)
        command.add_argument("destination", type=Path)
        dtypes = ["bfloat16", "float32"]
        command.add_argument("--dtype", choices=dtypes, default="float32")
        if name == "to-hf":
            command.add_argument("--max-shard-size", type=size, default="5GB")
            step_option(command)
            command.add_argument(
                "--push-to",
                metavar="OWNER/NAME",
                help="also upload it to this model repository of the Hugging Face hub",
            )
            command.add_argument(
                "--private",
                action="store_true",
                help="make the repository private if it is new",
            )


def size(text: str) -> int:
    """Parse "5GB", "200MB" or a plain number as bytes."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].isalpha() else (text, "")
    try:
        return int(float(number) * (units[unit] if unit else 1))
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected e.g. 5GB") from None


def from_hf(args: argparse.Namespace) -> None:
    """Run `oreal convert from-hf`."""
    from oreal_jax import program_cache
    from oreal_jax.checkpoints import hf
    from oreal_jax.checkpoints.source import import_model, open_model
    from oreal_jax.console import Screen
    from oreal_jax.mesh import MeshShape, make_mesh

    screen, total = Screen(), None
    if args.source.suffix != ".gguf":
        total = len(hf.tensors(open_model(args.source).config))
    program_cache.enable()
    with screen.phase("convert", total=total) as advance:
        import_model(
            args.source,
            args.destination,
            lambda model: make_mesh(MeshShape(), model),
            args.dtype,
            lambda name: advance(),
        )
    screen.log(f"wrote {args.destination}")


def to_hf(args: argparse.Namespace) -> None:
    """Run `oreal convert to-hf`."""
    import jax.numpy as jnp

    from oreal_jax import hub, program_cache
    from oreal_jax.checkpoints import hf
    from oreal_jax.checkpoints.export import export
    from oreal_jax.checkpoints.source import open_model
    from oreal_jax.console import Screen
    from oreal_jax.mesh import MeshShape, make_mesh

    if args.private and not args.push_to:
        raise InputError("--private without --push-to: nothing is uploaded")
    screen = Screen()
    source = open_model(args.source, args.step)
    check_new_directory(args.destination)
    if args.push_to:  # before the work
        hub.create_repository(args.push_to, private=args.private)
    program_cache.enable()
    with screen.phase("convert", total=len(hf.tensors(source.config))) as advance:
        export(
            source,
            source.load(make_mesh(MeshShape(), source.config), jnp.dtype(args.dtype)),
            args.destination,
            max_shard_size=args.max_shard_size,
            on_tensor=lambda name: advance(),
        )
    screen.log(f"wrote {args.destination}")
    if args.push_to:
        with screen.phase("upload"):
            address = hub.upload(args.destination, args.push_to)
        screen.log(f"uploaded as {address}")
