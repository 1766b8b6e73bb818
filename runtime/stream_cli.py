"""`edgeclip stream`: names what cameras and videos show, as labels that start and end."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli import Backend, Force, Labels, Templates, loaded

if TYPE_CHECKING:
    from .classifier import Classifier
    from .mqtt import MqttOutput
    from .outputs import Output


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
    Path | None, typer.Option(help="Annotated video (.mp4 .mkv .avi .webm), or new folder.")
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
    force: Force = False,
) -> None:
    """Name what cameras and videos show, as labels that start and end."""
    from .outputs import Annotated as AnnotatedVideo
    from .outputs import EventLines, JsonLines, event_file
    from .stream_run import check_outputs, print_summary, run, write_timeline
    from .timeline import TimelineOptions
    from .watch import Watch

    calm = TimelineOptions(smooth, enter, leave, dwell)
    several = len(source) > 1
    check_outputs(save, timeline, several, force)
    classifier = loaded(bundle, labels, templates, prompts, backend, precision)
    _check_rules(classifier, rule or [])
    print(f"edgeclip: {classifier!r}", file=sys.stderr)
    video = AnnotatedVideo(save, several, force) if save else None
    outputs: list[Output] = [JsonLines(sys.stdout, every) if as_json else EventLines(several)]
    outputs += [video] if video else []
    outputs += [event_file(events)] if events else []
    broker = _broker(mqtt)
    outputs += [broker] if broker else []
    watch = Watch(calm, rule or (), outputs, thumbnails)
    done = run(
        classifier, source, watch, fps=fps, realtime=realtime, skip_still=skip_still,
        seconds=seconds,
    )  # fmt: skip
    print_summary(done, broker)
    for place in video.written if video else []:
        print(f"edgeclip: wrote {place}", file=sys.stderr)
    if timeline:
        write_timeline(timeline, watch.history, classifier.labels, done.stats, force)
        print(f"edgeclip: wrote {timeline}", file=sys.stderr)


def _check_rules(classifier: "Classifier", rules: list[str]) -> None:
    """Raises DataError for a rule that cannot be read, or names what is no label."""
    from .rules import Rule

    tree = classifier.require_bank().layout.tree
    names = [*classifier.labels, *(tree.groups if tree else ())]
    for text in rules:
        Rule.parse(text, names)


def _broker(address: str | None) -> "MqttOutput | None":
    if address is None:
        return None
    from .mqtt import MqttOutput

    return MqttOutput(address)
