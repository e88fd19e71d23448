"""`backdrop watch`: questions about a camera, for as long as it runs."""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import Json, examples, known_model

if TYPE_CHECKING:
    from backdrop.watching.sinks import Sink, WatchEvent
    from backdrop.watching.sources import TimedFrame

EXAMPLE = examples(
    """backdrop scenes recording yard.mp4 --frames 60""",
    """backdrop watch yard.mp4 -q "How many vehicles are there?" \\
    --model examples/scenes-model --every 1 --jsonl answers.jsonl""",
    """backdrop watch rtsp://192.0.2.7/stream -q "Is the gate open?" \\
    --url http://localhost:8000/v1 --on-change --alert yes \\
    --mqtt mqtt://localhost/cameras/gate""",
)


def watch(
    source: Annotated[
        str,
        typer.Argument(
            help="rtsp:// or http(s):// URL of a camera, a webcam's number, a video file, or a folder of images."
        ),
    ],
    question: Annotated[
        list[str],
        typer.Option("-q", "--question", help="Asked about every frame; may be given several times."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Backdrop model that answers in this process: a folder or a Hub id.", callback=known_model
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Gateway or engine that answers, with /v1, instead of --model.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Of the gateway.", envvar="OPENAI_API_KEY")] = None,
    camera: Annotated[
        str, typer.Option(help="Name of the camera, whose references are its own; it stands in every answer.")
    ] = "camera",
    every: Annotated[float, typer.Option(help="Seconds between two frames, at least.", min=0)] = 5.0,
    on_change: Annotated[
        bool, typer.Option("--on-change", help="Ask only about frames in which something has changed.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Largest difference (0-255 grey levels) of a patch that is reused.", min=0, max=255
        ),
    ] = 10.0,
    alert: Annotated[
        str | None, typer.Option(help="Word that makes an answer an alert, such as yes.")
    ] = None,
    jsonl: Annotated[
        str | None,
        typer.Option(help="File that every answer is appended to as a line of JSON; - is standard output."),
    ] = None,
    webhook: Annotated[
        list[str] | None,
        typer.Option(help="URL that every answer is posted to as JSON; may be given several times."),
    ] = None,
    mqtt: Annotated[
        list[str] | None,
        typer.Option(help="mqtt://USER:PASSWORD@HOST/TOPIC that every answer is published to as JSON."),
    ] = None,
    send: Annotated[
        Literal["all", "alerts"],
        typer.Option(
            help="What webhooks and MQTT are sent: all answers, or those with which an alert begins."
        ),
    ] = "all",
    frames: Annotated[int | None, typer.Option(help="End after so many frames.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="End after so many seconds.", min=0)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1)] = 64,
    json_output: Json = False,
) -> None:
    """Ask questions about a camera's frames, and send the answers on; a summary of the reuse comes at the end."""
    import contextlib
    import signal

    from rich.console import Console

    from backdrop.watching.answerers import Answerer, Gateway, LocalModel
    from backdrop.watching.changes import ChangeWatcher
    from backdrop.watching.sinks import AlertsOnly, JsonLines, Mqtt, Webhook
    from backdrop.watching.sources import open_source
    from backdrop.watching.watch import watch as run

    if (model is None) == (url is None):
        raise ValueError("wanted one of --model (answers in this process) and --url (a gateway answers).")
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        opened = open_source(source, lambda line: console.print(f"[yellow]{line}[/]"))
        stack.callback(opened.close)
        sinks: list[Sink] = [JsonLines(jsonl)] if jsonl is not None else []
        network: list[Sink] = [*(Webhook(to) for to in webhook or ()), *(Mqtt(to) for to in mqtt or ())]
        sinks += network if send == "all" else [AlertsOnly(sink) for sink in network]
        answerer: Answerer
        if model is not None:
            with console.status(f"loading {model}"):
                answerer = LocalModel(model, {"tolerance": tolerance}, max_new_tokens)
        else:
            answerer = Gateway(str(url), camera, api_key, None, {"tolerance": tolerance}, max_new_tokens)
        stack.callback(answerer.close)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        # A service manager's stop ends the watching as Ctrl-C does: what waits is delivered, and the summary printed.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop))
        summary = run(
            opened,
            question,
            answerer,
            sinks,
            camera=camera,
            every=every,
            changes=ChangeWatcher(tolerance) if on_change else None,
            alert=alert,
            max_frames=frames,
            max_seconds=seconds,
            on_frame=None if jsonl == "-" else _show(console if json_output else Console()),
        )
    if json_output:
        typer.echo(json.dumps(summary.figures(), indent=2))
    else:
        console.print(_sentences(summary.figures()))


def _show(console: Any) -> Any:
    """Prints a line for each answer."""
    from rich.markup import escape

    def on_frame(frame: "TimedFrame", events: "list[WatchEvent]") -> None:
        for event in events:
            reused = f"{event.patches_reused / event.patches:4.0%} reused" if event.patches else ""
            said = f"[red]{escape(event.error)}[/]" if event.error else escape(event.answer or "")
            mark = "[bold red]ALERT[/] " if event.alert_began else ""
            took = f"{1000 * event.answer_seconds:5.0f} ms" if event.answer_seconds is not None else ""
            console.print(
                f"[dim]{event.time[11:19]} {escape(frame.name)}[/] {mark}{escape(event.question)} "
                f"[bold]{said}[/] [dim]{took} {reused}[/]",
                highlight=False,
            )

    return on_frame


def _sentences(figures: dict) -> str:
    lines = [
        f"{figures['frames']} frames, {figures['answers']} answers, {figures['alerts']} alerts"
        + (f", {figures['errors']} errors" if figures["errors"] else "")
        + (f"; {figures['unchanged']} frames unchanged" if figures["unchanged"] else "")
        + (f"; {figures['dropped']} dropped" if figures["dropped"] else "")
        + (f"; opened again {figures['reconnects']} times" if figures["reconnects"] else "")
    ]
    if figures["share_reused"] is not None:
        lines.append(f"{figures['share_reused']:.0%} of all patches were reused")
    reused, new = figures["milliseconds_reused"], figures["milliseconds_new_background"]
    if reused is not None and new is not None:
        lines.append(f"median time: {reused:.0f} ms with a known background, {new:.0f} ms with a new one")
    if figures["undelivered"]:
        lines.append(f"{figures['undelivered']} events could not be delivered")
    return "\n".join(lines)
