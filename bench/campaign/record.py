"""``campaign.json``: everything that a campaign found on one machine, at one state of the code."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.campaign.rows import Row
from bench.processes import ROOT
from decovae.errors import InputError
from decovae.files import write_text

FILE, ROWS = "campaign.json", "rows.jsonl"
VERSION = 1

SOURCES = ("decovae/**/*.py", "kernels/**/*.py", "kernels/**/*.json", "bench/*.py")
"""What the figures depend on; a campaign's own code is in a folder below bench/, and not in it."""

PEERS = ("monai", "liger-kernel", "lightly", "pytest-benchmark", "nvidia-ml-py")

IDENTITY_GPU = ("gpu", "gpu_memory_gib", "gpu_driver", "cuda", "torch", "triton")
IDENTITY_CPU = ("system", "processor", "torch_threads", "torch")
"""What makes another machine: its figures are not to be mixed."""


@dataclass
class Campaign:
    """A campaign so far.

    Attributes:
        scale: "gpu", "cpu" or "tiny".
        machine: `decovae.machine.describe`.
        commit: "id", "dirty" (whether Python files differ from it) and "sources", a digest of what figures depend on.
        versions: of what this project is compared with; None is not installed.
        date: of the last change.
        seconds: that it took, all sessions together.
        ceilings: of `bench.campaign.ceilings`.
        checks: "tour", "tests", "cold_start" and "sanitizer", each None until it ran.
        rows: that have ended.
        not_reached: ids of the others.
    """

    scale: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    versions: dict[str, str | None]
    date: str = ""
    seconds: float = 0.0
    ceilings: dict[str, Any] | None = None
    checks: dict[str, dict[str, Any] | None] = field(
        default_factory=lambda: {"tour": None, "tests": None, "cold_start": None, "sanitizer": None}
    )
    rows: list[Row] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Campaign:
        """What `save` wrote.

        Raises:
            InputError: there is no such file, or it is something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("kind") != "campaign" or content.pop("version") != VERSION:
                raise ValueError
            rows = [Row.from_dict(row) for row in content.pop("rows")]
            return cls(rows=rows, **content)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; `python -m bench.campaign` writes it.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a campaign that this version wrote; measure again with --fresh.") from error

    def save(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        self.date = datetime.date.today().isoformat()
        content = {
            "kind": "campaign",
            "version": VERSION,
            **{name: value for name, value in asdict(self).items() if name not in ("rows", "not_reached")},
            "rows": [row.as_dict() for row in self.rows],
            "not_reached": self.not_reached,
        }
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def commit() -> dict[str, Any]:
    """The state of the code; the commit is "unknown" outside a clone, where the digest still tells."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "*.py")
    return {"id": (head or "unknown").strip(), "dirty": bool(changed and changed.strip()), "sources": _digest()}


def _git(*arguments: str) -> str | None:
    try:
        process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return process.stdout if process.returncode == 0 else None


def _digest() -> str:
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str | None]:
    """Of the packages that this project is compared with, and measured by; None where one is not installed."""
    return {name: _version(name) for name in PEERS}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def another_peer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a package that figures were measured with has another version now; one that was missing had none."""
    return any(version is not None and now.get(name) != version for name, version in before.items())


def another_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In what the machine of a record is another, or None."""
    for key in IDENTITY_GPU if "gpu" in before or "gpu" in now else IDENTITY_CPU:
        if before.get(key) != now.get(key):
            return f"{key} {before.get(key)} there, {now.get(key)} here"
    return None


def begin(out: Path, *, scale: str, machine: dict[str, Any], commit: dict[str, Any], fresh: bool) -> Campaign:
    """The campaign of a folder: what is there of the same machine, scale, code and peers, and otherwise a new one.

    Args:
        out: the folder.
        scale: of the campaign.
        machine: it runs on.
        commit: the state of the code.
        fresh: forget what is there.

    Raises:
        InputError: there is a campaign of another machine or scale, or its file is damaged.
    """
    path, rows = out / FILE, out / ROWS
    if fresh:
        rows.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if path.exists():
        earlier = Campaign.load(path)
        other = another_machine(earlier.machine, machine)
        if earlier.scale != scale:
            other = f"scale {earlier.scale} there, {scale} here"
        if other:
            raise InputError(
                f"--out {out}: holds a campaign of another machine or scale ({other}); choose another folder, or "
                "forget that campaign with --fresh."
            )
        if earlier.commit.get("sources") == commit["sources"] and not another_peer(earlier.versions, versions()):
            earlier.machine, earlier.commit, earlier.versions = machine, commit, versions()
            return earlier
    if rows.exists():
        aside = out / "rows-before.jsonl"
        rows.replace(aside)
        print(
            f"{out}: what is there was measured with other code or peers, and is measured again; its rows are in "
            f"{aside.name}."
        )
    return Campaign(scale, machine, commit, versions())
