"""`oreal serve`."""

import argparse
import os

from oreal_jax.cli.options import Verb, check_min, load_engine, model_options
from oreal_jax.errors import InputError

PACKAGES = {"prometheus_client", "pydantic", "starlette", "uvicorn"}  # the extra
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_BIASES = 512  # biased tokens of a request


def add(verb: Verb) -> None:
    """Add `oreal serve`."""
    parser = verb(
        "serve",
        serve,
        "serve a model: an OpenAI-compatible API under /v1, and a page that shows "
        "several solutions to a question. API keys, if any, are read from "
        "OREAL_API_KEYS, separated by commas. Ctrl-C or SIGTERM finishes the running "
        "and waiting requests; a second one exits at once",
        "oreal serve --model runs/demo/run --port 8000",
    )
    model_options(parser)
    parser.set_defaults(rows=16)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 accepts the network: set API keys",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument(
        "--length",
        type=int,
        default=2048,
        help="maximum tokens of a prompt and its completion together, at most the "
        "model's; memory for as many is reserved for each of the --rows",
    )
    parser.add_argument(
        "--queue",
        type=int,
        default=256,
        help="maximum number of waiting completions; further ones get status 429",
    )
    parser.add_argument(
        "--name", help="the model's name in the API (default: --model as given)"
    )
    parser.add_argument(
        "--token-scores",
        action="store_true",
        help="also load the run's token reward model: the page colours each token by "
        "its score",
    )


def serve(args: argparse.Namespace) -> None:
    """Run `oreal serve`."""
    from oreal_jax.console import Screen

    try:
        from oreal_jax.sampling.session import Session
        from oreal_jax.serve import server
        from oreal_jax.serve.app import Service
        from oreal_jax.serve.scorer import Scorer
        from oreal_jax.serve.worker import Worker
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        message = f"oreal serve needs the extra `serve`: no module {error.name}"
        raise InputError(f"{message}; pip install 'oreal-jax[serve]'") from None

    check_min(0, "--queue", args.queue)
    check_min(2, "--length", args.length)
    keys = [
        key
        for x in os.environ.get("OREAL_API_KEYS", "").split(",")
        if (key := x.strip())
    ]
    screen = Screen.on_stderr()
    with server.listen(args.host, args.port) as listener:
        is_local = args.host.lower() in LOOPBACK
        if not keys and not is_local:
            screen.log(f"--host {args.host} without OREAL_API_KEYS: no key needed")
        model, engine = load_engine(args)
        chat, length = model.chat, min(args.length, model.config.max_length)
        with screen.phase("load"):
            session = Session(engine, engine.weights(model.params), length, MAX_BIASES)
        scorer = Scorer(model) if args.token_scores else None
        del model  # frees the loaded weights
        with screen.phase("compile"):
            server.warm_up(session, chat)
        worker = Worker(session, args.queue)
        hosts = LOOPBACK if is_local and not keys else ()
        service = Service(args.name or args.model, chat, worker, keys, scorer, hosts)
        server.Server(service, screen.log).run_on(listener)
