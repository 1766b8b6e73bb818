"""Tells systemd that a service is ready, still well, or ending (sd_notify's protocol).

Where the process was not started by a unit of `Type=notify` there is no $NOTIFY_SOCKET, and nothing
is told.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator


def notify(state: str) -> bool:
    """Sends a state such as "READY=1" or "STATUS=..."; whether somebody was told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # of Linux's abstract names
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(state.encode(), address)
        return True
    return False


@contextlib.contextmanager
def service(alive: Callable[[], bool]) -> Iterator[None]:
    """While it lasts systemd knows the service as ready, and as well for as long as `alive` says
    so; where it does not for `WatchdogSec` seconds, systemd ends and restarts the process."""
    ended = threading.Event()
    notify("READY=1")
    every = int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6 / 2
    if every:
        threading.Thread(
            target=_ping, args=(alive, every, ended), name="edgeclip systemd", daemon=True
        ).start()
    try:
        yield
    finally:
        ended.set()
        notify("STOPPING=1")


def _ping(alive: Callable[[], bool], every: float, ended: threading.Event) -> None:
    while not ended.wait(every):
        if alive():
            notify("WATCHDOG=1")
