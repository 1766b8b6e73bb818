"""Where this machine keeps what it has found out: text embeddings, and which backend is fastest."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$EDGECLIP_CACHE, else `edgeclip` in $XDG_CACHE_HOME, else ~/.cache/edgeclip. It may not exist
    yet; all that lies in it can be deleted at any time."""
    named = os.environ.get("EDGECLIP_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeclip"
