"""`edgeclip stream`: names what cameras and videos show, as labels that start and end."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli import Backend, Force, Labels, Templates, loaded

if TYPE_CHECKING:
    from .classifier import Classifier
    from .mqtt import MqttOutput
    from .outputs import Annotated as AnnotatedVideo
    from .outputs import Output
    from .rules import Rule


Source = Annotated[
    list[str],
    typer.Option(help="0, rtsp://, http://, csi://0, gst:..., a file, - ; repeatable."),
]
Realtime = Annotated[
    bool, typer.Option("--realtime", help="Play files as fast as they were filmed.")
]
SkipStill = Annotated[
    bool, typer.Option("--skip-still", help="Do not classify scenes that have not changed.")
]
RuleTexts = Annotated[list[str] | None, typer.Option(help="'person > 0.6 for 2s'; repeatable.")]
Save = Annotated[
    Path | None,
    typer.Option(help="Annotated video (.mp4: H.264 where ffmpeg is; .webm .mkv .avi), or folder."),
]
Timeline = Annotated[Path | None, typer.Option(help="Picture (.png) of the labels over time.")]
Events = Annotated[Path | None, typer.Option(help="Add the events to this file, as JSON lines.")]
Mqtt = Annotated[
    str | None, typer.Option(help="Send the events: mqtt://[user:password@]host/topic.")
]
Thumbnails = Annotated[
    int | None, typer.Option(min=16, help="Events carry a JPEG, so many pixels long.")
]
Every = Annotated[
    float, typer.Option(min=0, help="With --json: a frame's line every so many seconds.")
]
Logs = Annotated[str, typer.Option("--log-format", help="What it says of itself: text or json.")]
AsJson = Annotated[bool, typer.Option("--json", help="Frames and events as JSON lines.")]


def stream(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    source: Source,
    labels: Labels = None,
    templates: Templates = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt bank of the bundle.")] = None,
    fps: Annotated[float | None, typer.Option(help="At most so many frames a second.")] = None,
    realtime: Realtime = False,
    skip_still: SkipStill = False,
    smooth: Annotated[float, typer.Option(help="Time constant of the scores, seconds.")] = 0.5,
    enter: Annotated[float, typer.Option(help="Score over which a label starts.")] = 0.5,
    leave: Annotated[float, typer.Option(help="Score below which it ends.")] = 0.35,
    dwell: Annotated[float, typer.Option(help="Seconds for which a label lasts at least.")] = 1.0,
    rule: RuleTexts = None,
    save: Save = None,
    timeline: Timeline = None,
    events: Events = None,
    mqtt: Mqtt = None,
    thumbnails: Thumbnails = None,
    every: Every = 0.0,
    seconds: Annotated[float | None, typer.Option(min=0, help="End after so long.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, ... or auto.")] = "auto",
    backend: Backend = "auto",
    as_json: AsJson = False,
    log_format: Logs = "text",
    force: Force = False,
) -> None:
    """Name what cameras and videos show, as labels that start and end."""
    from .log import log, set_up
    from .opencv import hush
    from .outputs import EventLines, JsonLines
    from .stream import names_of
    from .stream_run import check_outputs, run, summarise, write_timeline
    from .timeline import TimelineOptions
    from .watch import Watch

    set_up(log_format)
    hush()
    calm = TimelineOptions(smooth, enter, leave, dwell)
    several = len(source) > 1
    check_outputs(save, timeline, source, force)
    classifier = loaded(bundle, labels, templates, prompts, backend, precision)
    rules = parsed_rules(classifier, rule or [])
    log.info("%r", classifier)
    video = _annotated(save, names_of(source), force) if save else None
    outputs: list[Output] = [JsonLines(sys.stdout, every) if as_json else EventLines(several)]
    outputs += [video] if video else []
    broker = mqtt_output(mqtt)
    outputs += event_outputs(events, broker)
    watch = Watch(calm, rules, outputs, thumbnails)
    done = run(
        classifier, source, watch, fps=fps, realtime=realtime, skip_still=skip_still,
        seconds=seconds,
    )  # fmt: skip
    summarise(done, broker, log_format)
    if timeline:
        write_timeline(timeline, watch.history, classifier.labels, done.stats, force)
    for place in [*(video.written if video else []), *([timeline] if timeline else [])]:
        log.info("wrote %s", place)


def _annotated(save: Path, sources: list[str], force: bool) -> "AnnotatedVideo":
    from .log import log
    from .outputs import Annotated as AnnotatedVideo
    from .video_out import note_of

    if note := note_of(save):
        log.warning("%s", note)
    return AnnotatedVideo(save, sources, force)


def parsed_rules(classifier: "Classifier", rules: list[str]) -> list["Rule"]:
    """The rules that these texts say. Raises DataError for one that cannot be read, or names what
    is no label."""
    from .rules import Rule

    tree = classifier.require_bank().layout.tree
    names = [*classifier.labels, *(tree.groups if tree else ())]
    return [Rule.parse(text, names) for text in rules]


def mqtt_output(address: str | None) -> "MqttOutput | None":
    """What sends events to a broker, where one is asked for. Raises DataError."""
    if address is None:
        return None
    from .mqtt import MqttOutput

    return MqttOutput(address)


def event_outputs(events: Path | None, broker: "MqttOutput | None") -> list["Output"]:
    """Where events go besides: a file, and a broker. Raises DataError."""
    from .event_file import EventFile

    outputs: list[Output] = [EventFile(events)] if events else []
    return [*outputs, broker] if broker else outputs
