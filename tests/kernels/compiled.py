"""Triton kernels compiled for GPUs that need not be present, and what their machine code does with memory.

`python -m tests.kernels.compiled` prints a table for every launch of `tests.kernels.test_compiled.EVERY_CASE`. It ends
with exit code 1 if one spills or moves large tensors in small pieces. The test reads those of its own CASES as JSON
from a process of its own, without TRITON_INTERPRET, which would leave kernels to an interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CAPABILITIES = (86, 90)  # RTX 3090 and H200

_EXCHANGES = ("LDS", "STS", "LDSM", "STSM", "SHFL", "BAR")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop. Widths are bytes a thread; exchanges are shared memory accesses, shuffles and barriers."""

    instructions: int
    loads: list[int]
    stores: list[int]
    exchanges: int


@dataclasses.dataclass(frozen=True)
class CompiledCode:
    """Resources and machine code of one kernel. Widths are bytes a thread, one entry an instruction."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    instructions: int
    loads: list[int]
    stores: list[int]
    local_accesses: int
    calls: int
    loops: list[Loop]
    layout_conversions_in_loops: int
    ttgir: str = ""
    sass: str = ""

    @property
    def spills(self) -> bool:
        return bool(self.stack_bytes or self.local_bytes or self.local_accesses)

    @property
    def main_loop(self) -> Loop | None:
        """The innermost loop that loads the most 16 bytes at a time."""
        loading = [loop for loop in self.loops if loop.loads]
        return max(loading, key=lambda loop: (loop.loads.count(16), loop.instructions), default=None)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as Triton would specialise it: enough to compile exactly that kernel."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def key(self) -> str:
        constants = [(index, repr(value)) for index, value in self.constants.items()]
        return repr((self.name, self.signature, constants, self.attributes, sorted(self.options.items())))


@dataclasses.dataclass(frozen=True)
class Result:
    """The code of one kernel that a case launches."""

    case: str
    kernel: str
    capability: int
    code: CompiledCode


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a host function, and what it is compiled for."""

    call: Callable[[], object]
    capabilities: tuple[int, ...]
    channels: int


class _AbsentDevice:
    """What Triton asks of the active driver before it compiles: here a device that need not exist.

    Its index is its capability, since a kernel remembers the target that it first met a device index with.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return _target(self.capability)


def _target(capability: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", capability, 32)


def launched_kernels(call: Callable[[], object], capability: int) -> list[Launch]:
    """Every launch that `call` makes, on a device of that capability, recorded in place of being run.

    Arguments may be CPU tensors, which need no memory behind them. Triton itself binds and specialises the arguments:
    an integer 1 becomes a constant, addresses and integers that are multiples of 16 are marked so. The process keeps
    the stand-in device, so nothing can be launched afterwards.
    """
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it before Triton is imported")
    launches: list[Launch] = []

    def record(*, fn: Any, compile: Mapping[str, Any], **_: object) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        launches.append(
            Launch(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0], options)
        )
        return True  # as if something else compiled it: the launch ends here

    triton.runtime.driver.set_active(_AbsentDevice(capability))
    previous = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = record
    try:
        call()
    finally:
        triton.knobs.runtime.jit_cache_hook = previous
    return launches


def compile_launch(launch: Launch, capability: int) -> CompiledCode:
    """The specialisation that this launch would compile."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=_target(capability), options=launch.options)
    return _inspect(compiled)


def compile_kernel(
    kernel: Any,
    *,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    divisible_by_16: Iterable[str] = (),
    num_warps: int = 4,
    capability: int,
) -> CompiledCode:
    """A kernel by its signature alone; arguments that are 1 at launch belong among the constants."""
    names = list(kernel.arg_names)
    launch = Launch(
        kernel,
        {name: "constexpr" if name in constants else signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16},
        {"num_warps": num_warps},
    )
    return compile_launch(launch, capability)


def _inspect(compiled: Any) -> CompiledCode:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run_tool("cuobjdump", "--dump-resource-usage", cubin)
        sass = _run_tool("nvdisasm", "--print-code", "--no-dataflow", cubin)
    resources = {name: max(map(int, re.findall(rf"\b{name}:(\d+)", usage))) for name in ("REG", "STACK", "LOCAL")}
    instructions, labels = _parse(sass)
    opcodes = [opcode for opcode, _ in instructions]
    ttgir = str(compiled.asm["ttgir"])
    return CompiledCode(
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        local_bytes=resources["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        instructions=len(opcodes),
        loads=_widths(opcodes, "LDG", "LDGSTS"),
        stores=_widths(opcodes, "STG"),
        local_accesses=sum(_base(opcode) in ("LDL", "STL") for opcode in opcodes),
        calls=sum(_base(opcode) == "CALL" for opcode in opcodes),
        loops=_innermost_loops(instructions, labels),
        layout_conversions_in_loops=_conversions_in_loops(ttgir),
        ttgir=ttgir,
        sass=sass,
    )


def _run_tool(name: str, *arguments: str | Path) -> str:
    """One of the CUDA tools that Triton ships beside its own assembler."""
    import triton

    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _parse(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Opcode and operands of every instruction, and the index of the instruction that every label precedes."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*(.*)", line):
            instructions.append((code[1], code[2]))
    return instructions, labels


def _base(opcode: str) -> str:
    return opcode.partition(".")[0]


def _widths(opcodes: Iterable[str], *bases: str) -> list[int]:
    """Bytes of each access: its modifier names them, and none means 4."""
    accesses = (opcode.split(".") for opcode in opcodes if _base(opcode) in bases)
    return [next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4) for parts in accesses]


def _innermost_loops(instructions: list[tuple[str, str]], labels: Mapping[str, int]) -> list[Loop]:
    """What lies between the target of a backward branch and the branch, where no other such span lies inside."""
    spans: dict[int, int] = {}
    for index, (opcode, operands) in enumerate(instructions):
        target = re.search(r"`\((\.L_\w+)\)", operands)
        # A branch to itself is the padding after the exit.
        if _base(opcode) == "BRA" and target and labels[target[1]] < index:
            spans[labels[target[1]]] = index  # of several branches to one head the last closes the loop
    loops = []
    for head, end in spans.items():
        if not any(head < other and spans[other] <= end for other in spans):
            opcodes = [opcode for opcode, _ in instructions[head : end + 1]]
            exchanges = sum(_base(opcode) in _EXCHANGES for opcode in opcodes)
            loops.append(Loop(len(opcodes), _widths(opcodes, "LDG", "LDGSTS"), _widths(opcodes, "STG"), exchanges))
    return loops


def _conversions_in_loops(ttgir: str) -> int:
    """Layout conversions inside a loop, each a trip through shared memory or shuffles on every turn."""
    count = 0
    loop: int | None = None
    for line in ttgir.splitlines():
        depth = len(line) - len(line.lstrip())
        if loop is None and re.search(r"\bscf\.(for|while)\b", line):
            loop = depth
        elif loop is not None and depth <= loop and line.lstrip().startswith("}") and "do {" not in line:
            loop = None
        elif loop is not None:
            count += "ttg.convert_layout" in line
    return count


def compile_cases(cases: Mapping[str, Case], capabilities: Iterable[int]) -> list[Result]:
    """Every kernel of every case for its capabilities among those given, each distinct specialisation compiled once."""
    launches = [
        (name, capability, launch)
        for capability in capabilities
        for name, case in cases.items()
        if capability in case.capabilities
        for launch in launched_kernels(case.call, capability)
    ]
    distinct = {(launch.key, capability): launch for _, capability, launch in launches}
    # Assembling happens in other programs, so threads suffice to keep a few processors busy.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        codes = pool.map(lambda item: compile_launch(item[1], item[0][1]), distinct.items())
        code = dict(zip(distinct, codes, strict=True))
    return [
        Result(name, launch.name, capability, code[launch.key, capability]) for name, capability, launch in launches
    ]


def to_json(results: Iterable[Result]) -> str:
    """Everything but the texts."""
    bare = (dataclasses.replace(r, code=dataclasses.replace(r.code, ttgir="", sass="")) for r in results)
    return json.dumps([dataclasses.asdict(result) for result in bare])


def from_json(text: str) -> list[Result]:
    results = []
    for item in json.loads(text):
        code = item.pop("code")
        loops = [Loop(**loop) for loop in code.pop("loops")]
        results.append(Result(**item, code=CompiledCode(**code, loops=loops)))
    return results


def compiled_in_subprocess(cache: Path) -> list[Result]:
    """The test's cases, compiled by a fresh interpreter that keeps Triton's cache in `cache`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-m", "tests.kernels.compiled", "--json", "--tested"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling the kernels failed:\n{done.stderr}")
    return from_json(done.stdout)


def table(results: Iterable[Result]) -> str:
    """One line a kernel; accesses as bytes×how many."""
    heads = "case|kernel|sm|regs|stack|local|shared|loads|loop loads|stores|"
    heads += "loop instr|loop exchanges|converts in loops|calls|instr"
    rows = [heads.split("|")]
    for result in results:
        code, loop = result.code, result.code.main_loop
        rows.append([
            result.case, result.kernel, str(result.capability), str(code.registers), str(code.stack_bytes),
            str(code.local_accesses), str(code.shared_bytes),
            describe(code.loads), describe(loop.loads if loop else []), describe(code.stores),
            str(loop.instructions if loop else "-"), str(loop.exchanges if loop else "-"),
            str(code.layout_conversions_in_loops), str(code.calls), str(code.instructions),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def describe(widths: Iterable[int]) -> str:
    return " ".join(f"{width}×{count}" for width, count in sorted(Counter(widths).items(), reverse=True)) or "-"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels and show what their machine code does.")
    parser.add_argument("--only", default="", help="a text that the names of the wanted cases contain")
    parser.add_argument("--tested", action="store_true", help="only what the test compiles")
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--dump", type=Path, help="folder for TTGIR and machine code")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    arguments = parser.parse_args()
    # Imported here: the test imports this module.
    from tests.kernels.test_compiled import CASES, EVERY_CASE, narrow

    cases = CASES if arguments.tested else EVERY_CASE
    wanted = {name: case for name, case in cases.items() if arguments.only in name}
    results = compile_cases(wanted, arguments.capability)
    if arguments.dump is not None:
        arguments.dump.mkdir(parents=True, exist_ok=True)
        for result in results:
            stem = f"{result.case}-{result.kernel}-sm{result.capability}"
            (arguments.dump / f"{stem}.ttgir").write_text(result.code.ttgir)
            (arguments.dump / f"{stem}.sass").write_text(result.code.sass)
    if arguments.json:
        print(to_json(results))
        return 0
    print(table(results))
    faults = []
    for result in results:
        found = [f"{result.kernel} spills"] * result.code.spills + narrow(result, wanted[result.case].channels)
        faults += [f"{result.case}, sm_{result.capability}: {fault}" for fault in found]
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
