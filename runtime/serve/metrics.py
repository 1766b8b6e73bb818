"""Numbers for Prometheus, in its text format 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .refusal import log_refusal

if TYPE_CHECKING:
    from .service import Service

TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[dict[str, str], float]
_FRAMES = ("seen", "classified", "skipped", "dropped", "thinned", "broken")


class Metrics:
    """What is counted of requests."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()
        """By method, address and status."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Taken by the requests of an address, altogether."""
        self.refused: Counter[int] = Counter()
        """Refused requests, connections and messages, by status."""

    def refuse(self, scope: Mapping[str, Any], status: int, why: str) -> None:
        """Counts and logs a refusal."""
        self.refused[status] += 1
        log_refusal(scope, status, why)

    def text(self, service: "Service", watching: int) -> str:
        """Everything, for one look of Prometheus."""
        parts = [
            _family("edgeclip_up", "gauge", "1 while the camera loop is well", [
                ({}, float(service.problem is None))
            ]),
            _family("edgeclip_labels", "gauge", "Labels in use", [
                ({}, len(service.classifier.labels))
            ]),
            _family("edgeclip_live_clients", "gauge", "Browsers that watch", [({}, watching)]),
            *self._of_sources(service),
            *self._of_requests(),
        ]  # fmt: skip
        return "".join(parts)

    def _of_sources(self, service: "Service") -> Iterable[str]:
        stats = service.cameras.stats() if service.cameras else []
        yield _family(
            "edgeclip_frames_total", "counter", "What became of a source's frames",
            [({"source": s.source, "became": n}, getattr(s, n)) for s in stats for n in _FRAMES],
        )  # fmt: skip
        for name in ("reconnects", "hangs"):
            samples: list[Sample] = [({"source": s.source}, getattr(s, name)) for s in stats]
            yield _family(f"edgeclip_{name}_total", "counter", f"A source's {name}", samples)
        live = [({"source": s.source}, float(s.state == "live")) for s in stats]
        yield _family("edgeclip_source_live", "gauge", "1 while a source gives frames", live)
        rates = [({"source": s.source}, s.fps) for s in stats]
        yield _family("edgeclip_frame_rate", "gauge", "Frames classified a second", rates)
        ages = [
            ({"source": s.source, "quantile": quantile}, ms / 1e3)
            for s in stats
            for quantile, ms in (("0.5", s.p50_ms), ("0.9", s.p90_ms), ("0.99", s.p99_ms))
        ]
        yield _family("edgeclip_frame_age_seconds", "gauge", "Age of frames when classified", ages)
        counts = [({"source": s, "event": e}, n) for (s, e), n in dict(service.hub.counts).items()]
        yield _family("edgeclip_events_total", "counter", "Labels and rules that changed", counts)

    def _of_requests(self) -> Iterable[str]:
        requests = [
            ({"method": method, "path": path, "status": str(status)}, count)
            for (method, path, status), count in self.requests.items()
        ]
        yield _family("edgeclip_requests_total", "counter", "Requests answered", requests)
        times = [({"path": path}, seconds) for path, seconds in self.seconds.items()]
        yield _family("edgeclip_request_seconds_total", "counter", "Time that they took", times)
        refused = [({"status": str(status)}, count) for status, count in self.refused.items()]
        yield _family("edgeclip_refused_total", "counter", "What was refused", refused)


def _family(name: str, kind: str, help: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"{name}{f'{{{inside}}}' if inside else ''} {value:.15g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
