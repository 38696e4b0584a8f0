"""Results kept between runs in the user's cache folder. A cache that cannot be used is no cache, never an error."""

from __future__ import annotations

import contextlib
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from decovae.files import write_atomically


def cache_folder() -> Path:
    """`$DECOVAE_CACHE`, else `$XDG_CACHE_HOME/decovae`, else `~/.cache/decovae`. It need not exist."""
    if chosen := os.environ.get("DECOVAE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "decovae"


def recall(key: str) -> dict[str, Any] | None:
    """What was remembered under `key`, or None; a damaged entry counts as none."""
    try:
        entry = json.loads(_entry(key).read_bytes())
    except (OSError, ValueError):
        return None
    return entry["value"] if isinstance(entry, dict) and entry.get("key") == key else None


def remember(key: str, value: dict[str, Any]) -> None:
    """Keep `value`, made of JSON's types, under `key`."""
    content = json.dumps({"key": key, "value": value}).encode()
    with contextlib.suppress(OSError):
        write_atomically(_entry(key), lambda file: file.write(content))


def _entry(key: str) -> Path:
    name = sha256(key.encode()).hexdigest()
    return cache_folder() / "volumes" / name[:2] / f"{name[2:]}.json"
