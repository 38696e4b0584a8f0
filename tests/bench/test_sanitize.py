"""What compute-sanitizer is asked, and what its output is taken to say; a script with its output stands in for it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import sanitize

KERNELS = ["_add_kernel", "_head_kernel"]
NEW_HELP = "  --kernel-name arg\n  --initcheck-track-filtered-global-memory arg (=yes)\n"
OLD_HELP = "  --kernel-regex arg\n"

INVALID = """\
========= COMPUTE-SANITIZER
ok    group norm: 0.1 of the allowed error; _add_kernel
========= Invalid __global__ read of size 4 bytes
=========     at _add_kernel+0x1d0 in /home/someone/decovae_kernels/group_norm_triton.py:41
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f6510c00001 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: [0x1a2b3c] in libcuda.so.1
=========
========= Invalid __global__ read of size 4 bytes
=========     at _add_kernel+0x1d0 in /home/someone/decovae_kernels/group_norm_triton.py:41
=========     by thread (1,0,0) in block (0,0,0)
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void cudnn::winograd<float>(float *)+0x70
=========
========= ERROR SUMMARY: 4 errors were not printed. Use --print-limit option to adjust the number of printed errors
========= ERROR SUMMARY: 7 errors
"""

RACES = """\
========= COMPUTE-SANITIZER
========= Warning: Race reported between Write access at _head_kernel+0x90 in latent_head_triton.py:41
=========     and Read access at _head_kernel+0x100 in latent_head_triton.py:51 [508 hazards]
=========
========= Error: Race reported between Write access at _add_kernel+0x90 in group_norm_triton.py:41
=========     and Write access at _add_kernel+0x100 in group_norm_triton.py:51 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_errors_in_other_kernels_are_not_ours() -> None:
    found = sanitize.parse("memcheck", INVALID, KERNELS)
    assert found is not None
    assert (found["errors"], found["elsewhere"]) == (6, 1)
    assert found["reports"] == [
        "2 × Invalid __global__ read of size 4 bytes, _add_kernel+0x1d0 in group_norm_triton.py:41"
    ]


def test_races_are_errors_or_warnings() -> None:
    found = sanitize.parse("racecheck", RACES, KERNELS)
    assert found is not None
    assert (found["errors"], found["warnings"], found["elsewhere"]) == (1, 1, 0)
    assert len(found["reports"]) == 2


def test_a_clean_summary_is_needed() -> None:
    clean = sanitize.parse("synccheck", "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", KERNELS)
    assert clean == {"errors": 0, "elsewhere": 0, "warnings": 0, "reports": []}
    assert sanitize.parse("racecheck", "========= ERROR SUMMARY: 0 errors\n", KERNELS) is None
    assert sanitize.parse("memcheck", "========= Error: process didn't terminate successfully\n", KERNELS) is None


def test_kernels_are_filtered_as_the_version_at_hand_asks() -> None:
    def words(options: str, tool: str) -> list[str]:
        return sanitize.command(Path("compute-sanitizer"), options, tool, KERNELS, Path("out.json"))

    new, old = words(NEW_HELP, "racecheck"), words(OLD_HELP, "racecheck")
    assert [new[new.index("--kernel-name") + 1], old[old.index("--kernel-regex") + 1]] == ["kns=_add_kernel"] * 2
    # Older versions do not see what filtered kernels write, and would call it uninitialised.
    assert "kns=_add_kernel" in words(NEW_HELP, "initcheck")
    assert "kns=_add_kernel" not in words(OLD_HELP, "initcheck")
    assert new[-4:] == ["-m", "bench.tour", "--out", "out.json"]


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU, a tour that only writes what it saw, and a compute-sanitizer that runs it and prints what is in a file."""
    tour = tmp_path / "tour.py"
    tour.write_text("import sys, pathlib\npathlib.Path(sys.argv[-1]).write_text(" + repr(json.dumps(
        {"cases": [], "kernels": KERNELS, "wrong": 0, "ended": True})) + ")\n")  # fmt: skip
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"""#!{sys.executable}
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(__file__).parent
if sys.argv[1] == "--version":
    print("NVIDIA (R) Compute Sanitizer\\nVersion 2026.4.0.0 (build 1)")
elif sys.argv[1] == "--help":
    print({NEW_HELP!r})
else:
    assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    answer = folder / sys.argv[sys.argv.index("--tool") + 1]
    if answer.exists():
        subprocess.run(sys.argv[sys.argv.index({str(sys.executable)!r}):], check=True)
        print(answer.read_text())
    else:
        print("it hangs", flush=True)
        time.sleep(60)
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "TOUR", [sys.executable, str(tour)])
    return tmp_path


def test_each_tool_runs_the_tour(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pretended / "memcheck").write_text(INVALID)
    (pretended / "racecheck").write_text(RACES)
    out = pretended / "found.json"
    assert sanitize.main(["--tools", "memcheck", "racecheck", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert result["version"] == "2026.4.0.0"
    assert [tool["errors"] for tool in result["tools"].values()] == [6, 1]
    assert all(tool["complete"] and tool["kernels"] == KERNELS for tool in result["tools"].values())
    printed = capsys.readouterr().out
    assert "memcheck: 6 errors" in printed
    assert "/home/" not in printed
    (pretended / "memcheck").write_text("========= ERROR SUMMARY: 0 errors\n")
    assert sanitize.main(["--tools", "memcheck"]) == 0


def test_what_got_through_is_kept(pretended: Path) -> None:
    for tool in ("memcheck", "racecheck"):
        (pretended / tool).write_text(INVALID)  # which has no summary of races
    first = sanitize.run(time.time() + 60, ["memcheck", "racecheck"])
    assert [tool["complete"] for tool in first["tools"].values()] == [True, False]
    (pretended / "memcheck").unlink()  # would hang
    (pretended / "racecheck").write_text(RACES)
    second = sanitize.run(time.time() + 60, ["memcheck", "racecheck"], first)
    assert second["tools"]["memcheck"] == first["tools"]["memcheck"]
    assert second["tools"]["racecheck"]["complete"]
    assert sanitize.run(time.time() - 1, ["memcheck", "racecheck"], second) == second
    late = sanitize.run(time.time() - 1, ["memcheck", "synccheck"], second)
    assert (late["tools"], late["not_reached"]) == (second["tools"], ["synccheck"])


def test_the_deadline_stops_a_tool(pretended: Path) -> None:
    program, out = pretended / "compute-sanitizer", pretended / "out.json"
    found = sanitize._check(program, NEW_HELP, "racecheck", KERNELS, time.time() + 0.5, out)
    assert not found["complete"]
    assert found["errors"] is None
    assert found["reports"] == ["it was out of time"]
    assert not sanitize.run(time.time() - 1).get("tools")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main([]) == 0
    assert capsys.readouterr().out.startswith("not checked: no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "find_program", lambda: None)
    result = sanitize.run(time.time() + 60)
    assert not result["available"]
    assert "nvidia-cuda-sanitizer-api" in result["reason"]
    assert sanitize.main(["--tools", "magic"]) == 2
