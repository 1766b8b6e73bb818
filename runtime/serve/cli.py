"""`edgeclip serve`: a page and an HTTP API for what cameras show."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..cli import Backend, Labels, Templates, loaded
from ..errors import BackendUnavailable
from ..stream_cli import (
    Events,
    Logs,
    Mqtt,
    RuleTexts,
    SkipStill,
    event_outputs,
    mqtt_output,
    parsed_rules,
)

if TYPE_CHECKING:
    from ..classifier import Classifier
    from ..mqtt import MqttOutput
    from .camera_loop import CameraLoop
    from .server import Server

Sources = Annotated[
    list[str] | None,
    typer.Option(help="0, rtsp://, http://, csi://0, a file, ...; repeatable. None: the API only."),
]
Realtime = Annotated[bool, typer.Option(help="Play files as fast as they were filmed.")]
Host = Annotated[str, typer.Option(help="Address; 0.0.0.0: all of this machine's.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
Token = Annotated[
    str | None,
    typer.Option(envvar="EDGECLIP_TOKEN", help="Who has it may come in; a must but on 127.0.0.1."),
]
MaxBody = Annotated[float, typer.Option(min=0.01, max=256, help="Largest picture, in MiB.")]
MaxPixels = Annotated[float, typer.Option(min=0.01, max=100, help="The same, in million pixels.")]
Rate = Annotated[float, typer.Option(min=0, help="POST and PUT a second of one address; 0: any.")]


def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    source: Sources = None,
    labels: Labels = None,
    templates: Templates = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt bank of the bundle.")] = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    token: Token = None,
    fps: Annotated[float | None, typer.Option(help="At most so many frames a second.")] = None,
    realtime: Realtime = True,
    skip_still: SkipStill = False,
    smooth: Annotated[float, typer.Option(help="Time constant of the scores, seconds.")] = 0.5,
    enter: Annotated[float, typer.Option(help="Score over which a label starts.")] = 0.5,
    leave: Annotated[float, typer.Option(help="Score below which it ends.")] = 0.35,
    dwell: Annotated[float, typer.Option(help="Seconds for which a label lasts at least.")] = 1.0,
    rule: RuleTexts = None,
    events: Events = None,
    mqtt: Mqtt = None,
    max_body: MaxBody = 16,
    max_pixels: MaxPixels = 25,
    rate: Rate = 100,
    log_format: Logs = "text",
    precision: Annotated[str, typer.Option(help="fp32, ... or auto.")] = "auto",
    backend: Backend = "auto",
) -> None:
    """Show in the browser what cameras see, and classify over HTTP.

    \b
    edgeclip serve bundle/ --source 0 --labels 'a person,nobody'
        then open http://localhost:8080
    edgeclip serve bundle/
        curl --data-binary @photo.jpg http://localhost:8080/classify
    EDGECLIP_TOKEN=... edgeclip serve bundle/ --source rtsp://door/stream --host 0.0.0.0
        then open http://this-machine:8080/?token=...
    """
    _require_packages()
    from ..log import log, set_up
    from ..opencv import hush
    from ..timeline import TimelineOptions
    from .access import check_token
    from .camera_loop import watch_cameras
    from .server import bound, run

    set_up(log_format)
    hush()
    check_token(token, host)
    calm = TimelineOptions(smooth, enter, leave, dwell)
    with bound(host, port) as listening:
        classifier = loaded(bundle, labels, templates, prompts, backend, precision)
        rules = parsed_rules(classifier, rule or [])
        log.info("%r", classifier)
        broker = mqtt_output(mqtt)
        cameras = watch_cameras(
            classifier, source or [], calm, rules, event_outputs(events, broker),
            fps=fps, realtime=realtime, skip_still=skip_still,
        )  # fmt: skip
        server = _server(classifier, cameras, token, host, max_body, max_pixels, rate)
        why = run(server, listening)
    _say_how_it_went(cameras, why, broker, log_format)


def _server(
    classifier: "Classifier",
    cameras: "CameraLoop | None",
    token: str | None,
    host: str,
    max_body: float,
    max_pixels: float,
    rate: float,
) -> "Server":
    """The server that the options ask for."""
    from .app import make_app
    from .server import Server
    from .service import Service

    service, most = Service(classifier, cameras, int(max_pixels * 1e6)), int(max_body * 2**20)
    app = make_app(service, token=token, host=host, max_body=most, rate=rate or None)
    return Server(service, app)


def _say_how_it_went(
    cameras: "CameraLoop | None", why: str, broker: "MqttOutput | None", log_format: str
) -> None:
    """Raises what ended the cameras, if anything did."""
    from ..log import log
    from ..stream_run import Done, summarise

    if cameras is None:
        log.info("ended: %s", why)
        return
    summarise(Done(cameras.stream.stats(), why), broker, log_format)
    if cameras.error:
        raise cameras.error


def _require_packages() -> None:
    missing = [name for name in ("starlette", "uvicorn", "websockets") if not find_spec(name)]
    if missing:
        raise BackendUnavailable(
            f"edgeclip serve needs {', '.join(missing)}: pip install 'edgeclip[serve]'"
        )
