"""Every shape of configuration that `bench.tune` would try, compiled for both cards of the design without a GPU.

python -m tests.kernels.candidates [--only TEXT] [--capability 86 90] [--fresh]

writes registers, shared memory, resident warps and what spills to bench/results/tuning-candidates.json, shape by shape,
and goes on where it was stopped; it takes a second or two a shape. What spills, or needs more shared memory than a
block of the smaller card has, is `refused` there, with the reason, and `bench.tune` does not try it on that card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.tune.candidates import COMPILED, SHARED_BYTES, Class, classes, shapes
from bench.tune.catalogue import FUNCTIONS
from bench.tune.work import Work
from decovae.files import write_text
from decovae_kernels.configurations import DEFAULT, Configuration, trying
from tests.kernels.compiled import CAPABILITIES, CompiledCode, compile_launch, launched_kernels

# Resident threads of a multiprocessor, in warps; both cards have 65536 registers, handed out by 256 a warp.
_WARPS = {86: 48, 90: 64}
_REGISTERS = 65536
_SHARED = {86: 100 << 10, 90: 228 << 10}


def small(work: Work) -> Work:
    """A work that compiles to the same code, with fewer voxels of wide features: only their divisibility matters."""
    if work.sizes[1] <= 16:
        return dataclasses.replace(work, sizes=(2, work.sizes[1], 24, 24, 24))
    return dataclasses.replace(work, sizes=(*work.sizes[:2], 4, 8, 8))


def compiled(kind: Class, use: Configuration, capability: int) -> CompiledCode | None:
    """The code that the kernel of this class compiles to; None where nothing is launched."""
    work = small(kind.works[0])
    with trying(kind.kernel, use):
        launches = launched_kernels(lambda: work.prepare(torch.device("cpu")).run(), capability)
    own = [launch for launch in launches if launch.name == FUNCTIONS[kind.kernel]]
    return compile_launch(own[0], capability) if own else None


def resident_warps(code: CompiledCode, warps: int, capability: int) -> int:
    """Warps of the kernel that a multiprocessor holds at once, by registers, shared memory and its slots."""
    a_warp = -(-code.registers * 32 // 256) * 256
    blocks = min(_REGISTERS // (a_warp * warps), _WARPS[capability] // warps)
    if code.shared_bytes:
        blocks = min(blocks, _SHARED[capability] // (code.shared_bytes + 1024))
    return blocks * warps


def describe(kind: Class, use: Configuration, capability: int, code: CompiledCode) -> dict[str, Any]:
    warps = dataclasses.asdict(use)["warps"]
    refused = None
    if code.spills:
        refused = f"spills: {code.stack_bytes} bytes of stack, {code.local_accesses} local accesses"
    elif code.shared_bytes > SHARED_BYTES:
        refused = f"needs {code.shared_bytes} bytes of shared memory"
    return {
        "class": kind.name, "kernel": kind.kernel, "architecture": f"sm_{capability}", "use": dataclasses.asdict(use),
        "registers": code.registers, "shared_bytes": code.shared_bytes,
        "resident_warps": resident_warps(code, warps, capability), "instructions": code.instructions,
        "loads_of_16_bytes": code.loads.count(16), "stores_of_16_bytes": code.stores.count(16), "refused": refused,
    }  # fmt: skip


def wanted(capabilities: list[int]) -> Iterator[tuple[Class, Configuration, int]]:
    """Everything to compile, the smaller card first."""
    for capability in capabilities:
        for kind in classes():
            if kind.kernel in FUNCTIONS:
                for use in shapes(kind.kernel, kind.present(DEFAULT)):
                    yield kind, use, capability


def key(entry: dict[str, Any]) -> str:
    return json.dumps([entry["class"], entry["architecture"], entry["use"]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every shape of configuration that bench.tune would try.")
    parser.add_argument("--only", default="", help="a text that the wanted classes' names contain")
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES))
    parser.add_argument("--fresh", action="store_true", help="forget what is there")
    arguments = parser.parse_args()
    import triton

    record: dict[str, Any] = {"kind": "tuning candidates", "triton": triton.__version__, "kernels": []}
    if COMPILED.exists() and not arguments.fresh:
        record["kernels"] = json.loads(COMPILED.read_text(encoding="utf-8"))["kernels"]
    todo = list(wanted(arguments.capability))
    known = {(kind.name, f"sm_{sm}", json.dumps(dataclasses.asdict(use))) for kind, use, sm in wanted([*CAPABILITIES])}
    found = {key(entry): entry for entry in record["kernels"]}
    found = {
        name: entry
        for name, entry in found.items()
        if (entry["class"], entry["architecture"], json.dumps(entry["use"])) in known
    }
    saved = time.monotonic()
    for kind, use, capability in todo:
        entry = {"class": kind.name, "architecture": f"sm_{capability}", "use": dataclasses.asdict(use)}
        if arguments.only not in kind.name or key(entry) in found:
            continue
        code = compiled(kind, use, capability)
        if code is None:
            raise RuntimeError(f"{kind.name} launched no {FUNCTIONS[kind.kernel]}")
        found[key(entry)] = describe(kind, use, capability, code)
        print(json.dumps(found[key(entry)]), flush=True)
        if time.monotonic() - saved > 10:
            save(record, found)
            saved = time.monotonic()
    save(record, found)


def save(record: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    lines = ",\n  ".join(json.dumps(entry) for entry in found.values())
    head = json.dumps({name: value for name, value in record.items() if name != "kernels"})
    write_text(COMPILED, f'{head[:-1]}, "kernels": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
