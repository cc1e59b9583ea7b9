"""Where everything lies that is made once and kept: converted models, compiled kernels."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$SHARDLINE_CACHE`, else `shardline` in the user's cache folder."""
    if explicit := os.environ.get("SHARDLINE_CACHE"):
        return Path(explicit).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "shardline"
