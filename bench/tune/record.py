"""What a tuning run found, as JSON that the next run goes on from, and what of it becomes data of the kernels."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.campaign.record import commit
from decovae import machine
from decovae.errors import InputError
from decovae.files import write_text
from decovae_kernels import configurations, upsample_conv_cost
from decovae_kernels.configurations import Configuration

VERSION = 1
_SAME = ("gpu", "torch", "triton", "cuda")


@dataclass
class Record:
    """A run so far.

    Attributes:
        scale: "gpu" or "tiny".
        architecture: whose configurations these are.
        machine: `decovae.machine.describe`.
        commit: of `bench.campaign.record`.
        classes: by name: kernel, conditions, the candidates with their timings, and which was chosen.
        fatal: candidates after which the process could not go on; they are not tried again.
        cost: what `bench.tune.cost` measured, fitted and compared; None until then.
    """

    scale: str
    architecture: str
    machine: dict[str, Any] = field(default_factory=machine.describe)
    commit: dict[str, Any] = field(default_factory=commit)
    date: str = ""
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)
    fatal: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        self.date = datetime.date.today().isoformat()
        content = {"kind": "tuning", "version": VERSION, **asdict(self)}
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @property
    def provenance(self) -> dict[str, str]:
        """Where its figures come from, as a rule of the data states it."""
        dirty = " with uncommitted changes" if self.commit.get("dirty") else ""
        facts = {name: str(self.machine.get(name)) for name in ("gpu", "torch", "triton")}
        return {
            "date": self.date or datetime.date.today().isoformat(),
            "driver": str(self.machine.get("gpu_driver")),
            "commit": f"{self.commit['id'][:12]}{dirty}",
            **facts,
        }


def resumed(path: Path | None, scale: str, architecture: str) -> Record:
    """What is in the file, or an empty record where there is none.

    Raises:
        InputError: the file is something else, or of another machine or state of the code.
    """
    fresh = Record(scale, architecture)
    if path is None or not path.exists():
        return fresh
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("kind") != "tuning" or content.pop("version") != VERSION:
            raise ValueError
        found = Record(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a record of bench.tune; name another file with --out.") from error
    different = [name for name in _SAME if found.machine.get(name) != fresh.machine.get(name)]
    different += ["scale"] * (found.scale != scale)
    different += ["code"] * (found.commit.get("sources") != fresh.commit.get("sources"))
    if different:
        raise InputError(f"{path}: was measured with another {' and '.join(different)}; name another file with --out.")
    return found


def with_rule(
    data: dict[str, Any], architecture: str, kernel: str, when: Mapping[str, Any], use: Configuration, chosen: Any
) -> None:
    """Put a rule first among those of that architecture and kernel, in the place of one with the same conditions."""
    rules = data.setdefault(architecture, {}).setdefault(kernel, [])
    rules[:] = [rule for rule in rules if rule.get("when", {}) != when]
    rules.insert(0, {"when": dict(when), **asdict(use), "chosen": chosen})


def write_data(record: Record) -> list[Path]:
    """Make what was chosen the kernels' data for the record's architecture; returns the files that were written.

    Raises:
        InputError: what would be written is no valid data; nothing is written then.
    """
    data = json.loads(configurations.FILE.read_text(encoding="utf-8"))
    for entry in record.classes.values():
        form = configurations.KERNELS[entry["kernel"]].form
        use = form(**entry["chosen"])
        with_rule(data, record.architecture, entry["kernel"], entry["when"], use, record.provenance)
    machines = json.loads(upsample_conv_cost.FILE.read_text(encoding="utf-8"))
    if record.cost is not None:
        machines[record.architecture] = {**record.cost["fitted"], "chosen": record.provenance}
    try:
        configurations.parse(data, "measured")
        upsample_conv_cost.parse(machines, "measured")
    except ValueError as error:
        raise InputError(f"nothing was written, since the kernels would refuse it: {error}.") from error
    write_text(configurations.FILE, dumped(data))
    written = [configurations.FILE]
    if record.cost is not None:
        write_text(upsample_conv_cost.FILE, json.dumps(machines, indent=2, ensure_ascii=False) + "\n")
        written.append(upsample_conv_cost.FILE)
    return written


def dumped(data: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> str:
    """JSON with a line for each rule."""
    return _object(data, 1, lambda kernels: _object(kernels, 2, _rules)) + "\n"


def _object(items: Mapping[str, Any], depth: int, dump: Any) -> str:
    pad = "  " * depth
    lines = ",\n".join(f"{pad}{json.dumps(name)}: {dump(value)}" for name, value in items.items())
    return f"{{\n{lines}\n{pad[2:]}}}"


def _rules(rules: list[dict[str, Any]]) -> str:
    lines = ",\n".join(f"      {json.dumps(rule, ensure_ascii=False)}" for rule in rules)
    return f"[\n{lines}\n    ]"
