"""`backdrop serve`: engines and gateway together."""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Fit, examples, known_model

if TYPE_CHECKING:
    from backdrop.serving.engine import Engine
    from backdrop.serving.engine_settings import EngineSettings
    from backdrop.serving.settings import GatewaySettings

EXAMPLE = examples(
    "make serve-setup",
    """backdrop serve examples/scenes-model --port 8000 --dtype float32 \\
    --max-model-len 512 --backgrounds 100 -- --enforce-eager""",
    "curl localhost:8000/v1/models",
)

# Longer than clients (httpx and what is built on it: 5) and load balancers (usually 60) keep an idle connection: where both
# give it up in the same moment, a request that is just being sent ends in a reset.
KEEPALIVE_SECONDS = 75


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Exported Backdrop folder or Hub id.", callback=known_model)
    ] = None,
    engine_args: Annotated[
        list[str] | None, typer.Argument(help="After `--`: further arguments of vLLM's server.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address that the gateway listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the gateway.")] = 8000,
    replicas: Annotated[int, typer.Option(help="Engines to start.", min=0)] = 1,
    replica: Annotated[
        list[str] | None, typer.Option(help="URL of an engine that runs already; may be given several times.")
    ] = None,
    engine_port: Annotated[int, typer.Option(help="Port of the first engine; the next ones follow.")] = 8100,
    engine_python: Annotated[str | None, typer.Option(help="Python of the environment with vLLM.")] = None,
    name: Annotated[str, typer.Option(help="The model's name in the API.")] = "backdrop",
    config: Annotated[Path | None, typer.Option(help="YAML file: keys, limits, matching, hosts.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference (0-255 grey levels) of a patch that is reused. Default: 10.",
            min=0,
            max=255,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and answer, tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests in one batch.")] = None,
    backgrounds: Annotated[
        int | None, typer.Option(help="Size the cache for so many backgrounds (needs --max-model-len).")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens in a block of vLLM's cache. Default: 32.")
    ] = None,
    split: Annotated[
        bool | None, typer.Option("--split/--no-split", help="--no-split: whole images, plain LLaVA.")
    ] = None,
    fit: Fit = None,
    start_seconds: Annotated[float, typer.Option(help="Longest time for the engines to start.")] = 600.0,
    log_folder: Annotated[
        Path | None, typer.Option(help="Folder for the engines' logs. Default: a temporary one.")
    ] = None,
    hash_key: Annotated[
        bool,
        typer.Option("--hash-key", help="Read an API key from standard input, print its hash, and exit."),
    ] = False,
) -> None:
    """Serve a model over an OpenAI-compatible API: vLLM behind a gateway that splits and matches."""
    from backdrop.serving.engine import Engine
    from backdrop.serving.settings import make_settings, read_settings
    from backdrop.serving.sizing import plan_engines
    from backdrop.serving.tenants import hash_key as hash_of

    if hash_key:
        typer.echo(hash_of(sys.stdin.readline().strip()))
        return
    if model is None:
        raise ValueError("MODEL is missing; wanted an exported Backdrop folder or a Hub id.")
    given = read_settings(config) if config is not None else {}
    urls, starts = list(replica or []), not replica and not given.get("replicas")
    if starts:
        if replicas < 1:
            raise ValueError("--replicas is 0; wanted 1 or more, or --replica URL.")
        urls = [f"http://127.0.0.1:{engine_port + i}" for i in range(replicas)]
    values = {"replicas": urls or None, "processor": model, "split": split, "fit": fit}
    settings = make_settings(
        str(config or "options"), **given | {k: v for k, v in values.items() if v is not None}
    )
    planned: list[EngineSettings] = []
    if starts:
        planned, size = plan_engines(
            model,
            [engine_port + i for i in range(replicas)],
            python=engine_python,
            name=name,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            backgrounds=backgrounds,
            block_size=block_size,
            max_images=settings.limits.images,
            fit=settings.fit,
            extra=tuple(engine_args or ()),
        )
        if size is not None:
            typer.echo(size)
    if tolerance is not None:
        settings.matching.tolerance = tolerance
    folder = log_folder or Path(tempfile.mkdtemp(prefix="backdrop-serve-"))
    folder.mkdir(parents=True, exist_ok=True)
    engines = [Engine(engine, folder / f"engine-{engine.port}.log") for engine in planned]
    _run(settings, engines, host, port, start_seconds)


def _run(
    settings: "GatewaySettings", engines: "list[Engine]", host: str, port: int, start_seconds: float
) -> None:
    import asyncio
    import logging
    import signal

    import uvicorn
    from rich.console import Console

    from backdrop.serving.gateway import make_app

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    console = Console(stderr=True)
    if not settings.keys and host not in ("127.0.0.1", "localhost", "::1"):
        console.print(f"[yellow]no API keys: everybody who reaches {host} can ask (keys in --config)[/]")

    async def main() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is not None:  # always, within asyncio.run
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, task.cancel)
        async with contextlib.AsyncExitStack() as stack:
            for engine in engines:
                stack.push_async_callback(engine.stop)
                await engine.start()
            if engines:
                with console.status(f"starting {len(engines)} engine(s); logs in {engines[0].log.parent}"):
                    await asyncio.gather(*(engine.ready(start_seconds) for engine in engines))
            server = uvicorn.Server(
                uvicorn.Config(
                    make_app(settings),
                    host=host,
                    port=port,
                    timeout_keep_alive=KEEPALIVE_SECONDS,
                    timeout_graceful_shutdown=30,
                    access_log=False,
                    lifespan="on",
                )
            )
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                # uvicorn takes the signal, drains, and raises it again: the engines are still to be stopped then.
                signal.signal(number, lambda *_: None)
            console.print(f"serving on http://{host}:{port}/v1")
            await server.serve()
        if not server.started:
            raise RuntimeError(f"the gateway did not start on {host}:{port}; see above")

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(main())
