"""Tuning without a GPU: candidates are launchable and agree, and timings that are given lead to the right choice."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.settings import training_settings
from bench.tune import command, cost, judge, measure, record
from bench.tune.__main__ import main
from bench.tune.candidates import Class, candidates, classes, code_of, compiled, refused, shapes
from bench.tune.catalogue import FUNCTIONS
from decovae.errors import InputError, RunError
from decovae.runtime import start_runtime
from decovae_kernels import configurations, upsample_conv_cost
from decovae_kernels._launch import recorded
from decovae_kernels.configurations import DEFAULT, KERNELS, Slab, Streaming, checked
from tests.channel_cases import DEVICE

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton not installed")
CLASSES = {kind.name: kind for kind in classes()}


def timings(*medians: float, spread: float = 0.0) -> dict[str, list[float]]:
    """Samples around these medians, a shape each, with that interquartile range as a share of them."""
    steps = (-1.0, -0.5, 0.0, 0.5, 1.0)
    return {str(i): [median * (1 + step * spread) for step in steps] for i, median in enumerate(medians)}


@pytest.mark.parametrize(
    ("candidate", "better"),
    [
        (timings(0.90, 1.8), True),
        (timings(0.98, 1.96), False),  # within what differs between processes
        (timings(0.95, 1.9, spread=0.06), False),  # within its own spread
        (timings(0.95, 1.9, spread=0.02), True),
        (timings(0.80, 2.2), False),  # loses at a shape
        (timings(0.80, 2.02), True),  # a little, within the noise
        (timings(1.10, 2.0), False),
    ],
)
def test_faster_is_what_saves_more_than_the_noise_at_no_shape_s_expense(candidate: Any, better: bool) -> None:
    present = timings(1.0, 2.0)
    assert judge.verdict(present, candidate).better == better
    assert judge.winner(present, [candidate]) == (0 if better else None)


def test_the_noise_of_today_s_configuration_counts_too() -> None:
    assert not judge.verdict(timings(1.0, spread=0.1), timings(0.92)).better


def test_shapes_count_alike_however_long_they_take() -> None:
    assert judge.verdict(timings(1e-6, 1.0), timings(0.8e-6, 1.0)).gain == pytest.approx(0.1)


def test_the_fastest_wins_and_the_first_among_equals() -> None:
    present = timings(1.0)
    others = [timings(0.9), None, timings(0.7), timings(0.7), timings(1.2)]
    assert judge.winner(present, others) == 2
    assert judge.winner(present, [None, None]) is None


def test_with_nothing_to_compare_with_the_fastest_wins_each_shape_alike() -> None:
    assert judge.fastest([None, timings(1.0, 1.0), timings(0.1, 1.5), timings(0.1, 1.5)]) == 2
    assert judge.fastest([None, None]) is None


def test_candidates_begin_with_today_s_and_can_all_be_launched() -> None:
    for kind in CLASSES.values():
        present = kind.present(DEFAULT)
        found = candidates(kind.kernel, present)
        assert found[0] == present
        assert len(set(found)) == len(found)
        assert len(found) > 1
        for use in found:
            assert isinstance(checked(use, kind.name), KERNELS[kind.kernel].form)


def test_every_kernel_has_a_class_and_a_class_one_configuration() -> None:
    assert {kind.kernel for kind in CLASSES.values()} == set(KERNELS)
    for kind in CLASSES.values():
        uses = {configurations.rule(kind.kernel, DEFAULT, *work.condition).use for work in kind.works}
        assert uses == {kind.present(DEFAULT)}


def test_classes_do_not_overlap() -> None:
    """What is chosen for one must not be found by the lookups of another, whatever order they are written in."""
    for kind in CLASSES.values():
        use = kind.present(DEFAULT)
        rule = configurations.Rule(use, "measured", kind.channels, kind.layout, kind.element)
        for other in CLASSES.values():
            if other.kernel == kind.kernel:
                assert {rule.holds(*work.condition) for work in other.works} == {other == kind}


def test_refused_shapes_are_no_candidates_on_any_grid() -> None:
    use = Streaming(warps=4, width=8, vectors=1, programs=4)
    spilling = Streaming(warps=4, width=8, vectors=2, programs=1)
    found = candidates("moments", use, [spilling, use])
    assert found[0] == use
    assert not [other for other in found if other.vectors == 2]
    assert [other for other in found if other.warps == 8]


def test_the_record_of_compiled_shapes_is_of_today_s_and_today_s_do_not_spill() -> None:
    recorded = [
        (entry["class"], entry["architecture"], KERNELS[entry["kernel"]].form(**entry["use"])) for entry in compiled()
    ]
    expected = {
        (kind.name, card, use)
        for kind in CLASSES.values()
        for card in ("sm_86", "sm_90")
        for use in shapes(kind.kernel, kind.present(DEFAULT))
        if kind.kernel != "slab"
    }
    assert len(recorded) == len(expected)
    assert set(recorded) == expected, "python -m tests.kernels.candidates brings it up to date"
    for kind in CLASSES.values():
        for card in ("sm_86", "sm_90"):
            spilling = {code_of(use) for use in refused(kind.name, card)}
            assert code_of(kind.present(card)) not in spilling


# One kernel of each form, a change of warps, of a tile, and of a grid; `--tiny` runs all candidates of all.
SAMPLED = [
    ("norm_apply/channels_last/2B", 8),
    ("norm_sums/channels_last/4B", 12),
    ("moments_gradient/C3-4/interleaved/2B", 9),
    ("downsample/channels_last/2B", 2),
    ("norm_state/contiguous/2B", 3),
    ("norm_coefficients/contiguous/2B", 2),
    ("loss/contiguous", 1),
    ("moments/C3-4/interleaved/4B", 6),
]


@needs_triton
@pytest.mark.device
@pytest.mark.parametrize(("name", "index"), SAMPLED)
def test_candidates_compute_what_plain_torch_does(name: str, index: int) -> None:
    kind = CLASSES[name]
    use = candidates(kind.kernel, kind.present(DEFAULT))[index]
    work = kind.works[0].tiny()
    prepared = work.prepare(DEVICE)
    facts = measure.check(work, use, prepared, prepared.expected())
    assert facts["error"] <= 8e-3


@needs_triton
@pytest.mark.device
def test_what_merges_is_timed_alone_and_not_with_the_pass_around_it() -> None:
    for kernel in ("norm_state", "norm_coefficients", "loss"):
        (kind,) = (kind for kind in CLASSES.values() if kind.kernel == kernel)
        prepared = kind.works[0].tiny().prepare(DEVICE)
        with recorded() as launches:
            prepared.run()
        assert [launch.kernel for launch in launches] == [FUNCTIONS[kernel]]


@needs_triton
@pytest.mark.device
def test_a_candidate_that_computes_something_else_is_discarded() -> None:
    kind = CLASSES["loss/contiguous"]
    work = kind.works[0].tiny()
    prepared = work.prepare(DEVICE)
    loss, direction = prepared.expected()
    with pytest.raises(measure.Discarded, match=r"differs by .*, more than 2e-05"):
        measure.check(work, kind.present(DEFAULT), prepared, (loss * 1.001, direction))
    unwritten = prepared._replace(run=lambda: (loss, torch.empty_like(direction)))
    with pytest.raises(measure.Discarded, match="launched no _loss_kernel"):
        measure.check(work, kind.present(DEFAULT), unwritten, (loss, direction))


def test_memory_that_nothing_wrote_is_seen() -> None:
    with measure.poisoned_memory():
        assert torch.empty(8).isnan().all()
    assert measure.relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert measure.relative_error(torch.ones(3), torch.ones(2)) == float("inf")
    assert measure.relative_error(torch.full((4,), 1.01), torch.ones(4)) == pytest.approx(0.01, rel=1e-3)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Class:
    """A class at tiny sizes, where a call takes as many seconds as it has warps, but for 16: far less."""

    def seconds(runs: Any, calls: int) -> float:
        for run in runs:
            run()
        warps = configurations.LOSS.on(torch.device("cpu"), 16, "contiguous", 8).warps
        return 0.1 if warps == 16 else float(warps)

    monkeypatch.setattr(measure.stopwatch, "seconds", seconds)
    monkeypatch.setattr(measure.stopwatch, "calls_for", lambda _: 1)
    monkeypatch.setattr(measure.stopwatch, "input_sets", lambda *_: 2)
    kind = CLASSES["loss/contiguous"]
    return dataclasses.replace(kind, works=tuple(work.tiny() for work in kind.works[:1]))


@needs_triton
@pytest.mark.device
def test_tuning_times_what_is_right_and_chooses_the_fastest(timed: Class) -> None:
    fatal = [{"class": timed.name, "use": {"warps": 16}, "reason": "an illegal memory access"}]
    entry = measure.tune(timed, DEFAULT, DEVICE, fatal, repeats=3)
    assert (entry["present"], entry["chosen"], entry["changed"]) == ({"warps": 8}, {"warps": 4}, True)
    by_warps = {candidate["use"]["warps"]: candidate for candidate in entry["candidates"]}
    assert [len(samples) for samples in by_warps[4]["seconds"].values()] == [3]
    assert by_warps[4]["verdict"]["gain"] == pytest.approx(0.5)
    assert by_warps[16]["discarded"] == "cost the process its GPU: an illegal memory access"
    assert not by_warps[16]["seconds"]


@needs_triton
@pytest.mark.device
def test_a_lost_gpu_is_remembered_and_not_lost_again(
    timed: Class, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = measure.check

    def failing(work: Any, use: Any, *arguments: Any, **options: Any) -> Any:
        if use.warps == 16:
            raise measure.Fatal(use, "CUDA error")
        return check(work, use, *arguments, **options)

    monkeypatch.setattr(measure, "check", failing)
    monkeypatch.setattr(command, "classes", lambda: [timed])
    found = record.Record("gpu", DEFAULT)
    with pytest.raises(RunError, match=r"warps=16.* cost this process the GPU"):
        command._tune(found, ["loss"], float("inf"), tmp_path / "out.json", DEVICE)
    again = record.resumed(tmp_path / "out.json", "gpu", DEFAULT)
    command._tune(again, ["loss"], float("inf"), tmp_path / "out.json", DEVICE)
    assert again.classes[timed.name]["chosen"] == {"warps": 4}


CASES_OF_THE_PRESENT = [
    # What happens to 8 warps, today's; which are chosen; whether 8 have a verdict.
    (measure.Discarded("does not run: out of resource: registers"), 4, False),
    (measure.Discarded("differs by 1.0e-01, more than 2e-05"), 4, False),
    (None, 8, True),
]


@needs_triton
@pytest.mark.device
@pytest.mark.parametrize(("failure", "chosen", "compared"), CASES_OF_THE_PRESENT)
def test_where_today_s_is_wrong_or_does_not_run_the_fastest_that_is_right_wins(
    timed: Class, monkeypatch: pytest.MonkeyPatch, failure: Exception | None, chosen: int, compared: bool
) -> None:
    check = measure.check

    def failing(work: Any, use: Any, *arguments: Any, **options: Any) -> Any:
        if use.warps == 8 and failure is not None:
            raise failure
        if use.warps == 16 or (use.warps == 4 and failure is None):
            raise measure.Discarded("spills 8 bytes")
        return check(work, use, *arguments, **options)

    monkeypatch.setattr(measure, "check", failing)
    entry = measure.tune(timed, DEFAULT, DEVICE, repeats=3)
    assert (entry["chosen"], entry["changed"]) == ({"warps": chosen}, not compared)
    present, *_ = entry["candidates"]
    assert ("verdict" in present) == compared
    if failure is not None:
        assert present["discarded"] == str(failure)
        assert str(failure) in command._told(entry)


@needs_triton
@pytest.mark.device
def test_what_cannot_be_launched_is_discarded_whatever_it_raises(timed: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    from decovae_kernels import moments_triton

    launch = moments_triton.launch

    def failing(*arguments: Any, **options: Any) -> None:
        if options["num_warps"] == 8:
            raise RuntimeError("out of resource: shared memory")
        launch(*arguments, **options)

    monkeypatch.setattr(moments_triton, "launch", failing)
    entry = measure.tune(timed, DEFAULT, DEVICE, repeats=3)
    assert entry["candidates"][0]["discarded"] == "does not run: out of resource: shared memory"
    assert entry["changed"]
    assert entry["chosen"] != entry["present"]


@needs_triton
@pytest.mark.device
def test_today_s_may_spill_and_stays_while_no_other_is_faster(timed: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def spilling() -> Iterator[list[Any]]:
        with recorded() as launches:
            found: list[Any] = []
            yield found
        spilled = SimpleNamespace(n_spills=8, n_regs=255)
        found += [launch._replace(compiled=spilled) for launch in launches]

    monkeypatch.setattr(measure, "recorded", spilling)
    entry = measure.tune(timed, DEFAULT, DEVICE, repeats=3)
    present, *others = entry["candidates"]
    assert (present["discarded"], entry["changed"]) == (None, False)
    assert all("spills 8 bytes" in other["discarded"] for other in others)


@needs_triton
@pytest.mark.device
def test_where_nothing_is_right_nothing_is_chosen(timed: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise measure.Discarded("does not run")

    monkeypatch.setattr(measure, "check", failing)
    with pytest.raises(measure.Discarded, match="nor is any candidate right"):
        measure.tune(timed, DEFAULT, DEVICE, repeats=3)


def _settings() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cudnn.enabled


def test_the_settings_of_training_are_those_that_a_run_starts_with(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = _settings()
    with training_settings(torch.device("cpu")):
        assert _settings() == outside
    with training_settings(torch.device("cuda", 0)):
        inside = _settings()
    assert _settings() == outside
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    # As a process begins, where the tests' own settings are stricter.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        try:
            with start_runtime("cuda"):
                assert _settings() == inside
        finally:
            torch.set_float32_matmul_precision(outside[0])


def test_kernels_and_cost_model_are_measured_in_the_settings_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with training_settings(torch.device("cuda", 0)):
        expected = _settings()
    found = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(configurations, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(command, "_tune", lambda *_: found.append(_settings()))
    options = argparse.Namespace(tiny=False, write=False, minutes=1.0, only=["cost"], out=None)
    assert command.run(options) == 0
    assert found == [expected]


@needs_triton
def test_no_class_begins_after_the_deadline(timed: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "classes", lambda: [timed])
    found = record.Record("gpu", DEFAULT)
    command._tune(found, ["loss"], 0.0, None, DEVICE)
    assert not found.classes


def _found(kind: Class, chosen: Any) -> record.Record:
    found = record.Record(
        "gpu", "sm_90", {"gpu": "a card", "gpu_driver": "1.2", "torch": "2", "triton": "3"}, {"id": "f" * 40}
    )
    entry = {"kernel": kind.kernel, "when": kind.when, "chosen": dataclasses.asdict(chosen)}
    found.classes[kind.name] = entry
    return found


@pytest.fixture
def data_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the kernels' data files in the place of theirs."""
    files = []
    for module in (configurations, upsample_conv_cost):
        copy = tmp_path / module.FILE.name
        copy.write_text(module.FILE.read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(module, "FILE", copy)
        files.append(copy)
    return files[0], files[1]


def test_what_was_chosen_becomes_data_with_its_provenance(data_files: tuple[Path, Path]) -> None:
    kind, before = CLASSES["slab/channels_last/2B"], configurations.load()
    assert record.write_data(_found(kind, Slab(1 << 27))) == [data_files[0]]
    table = configurations.load()
    rule = configurations.rule("slab", "sm_90", 256, "channels_last", 2, table)
    assert rule.use == Slab(1 << 27)
    assert isinstance(rule.chosen, dict)
    assert (rule.chosen["gpu"], rule.chosen["driver"], rule.chosen["commit"]) == ("a card", "1.2", "f" * 12)
    assert table[DEFAULT] == before[DEFAULT]
    for card, element in (("sm_86", 2), ("sm_90", 4)):
        found = configurations.rule("slab", card, 256, "channels_last", element, table)
        assert found.use == configurations.rule("slab", card, 256, "channels_last", element, before).use
    record.write_data(_found(kind, Slab(1 << 24)))
    rules = configurations.load()["sm_90"]["slab"]
    assert [rule.use for rule in rules if rule.element == 2] == [Slab(1 << 24)]


def test_the_data_file_is_as_it_would_be_written() -> None:
    text = configurations.FILE.read_text(encoding="utf-8")
    assert record.dumped(json.loads(text)) == text


def test_data_that_the_kernels_would_refuse_are_not_written(data_files: tuple[Path, Path]) -> None:
    text = data_files[0].read_text(encoding="utf-8")
    with pytest.raises(InputError, match="nothing was written"):
        record.write_data(_found(CLASSES["slab/channels_last/2B"], Slab(7)))
    assert data_files[0].read_text(encoding="utf-8") == text


def test_a_run_goes_on_only_from_its_own_machine_and_code(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    record.Record("tiny", DEFAULT, classes={"a": {}}).save(file)
    assert record.resumed(file, "tiny", DEFAULT).classes == {"a": {}}
    with pytest.raises(InputError, match="measured with another scale"):
        record.resumed(file, "gpu", DEFAULT)
    content = json.loads(file.read_text(encoding="utf-8"))
    content["commit"]["sources"] = "other"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match="measured with another code"):
        record.resumed(file, "tiny", DEFAULT)
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"not a record of bench\.tune"):
        record.resumed(file, "tiny", DEFAULT)


MACHINE = upsample_conv_cost.Machine(
    products={2: 300e12, 4: 30e12},
    convolutions={2: 200e12, 4: 100e12},
    bandwidth=3e12,
    direct_moves=70.0,
    factorised_moves=120.0,
    lanes=1e13,
    instructions=3000.0,
)


def _as_timed(name: str, sizes: tuple[int, ...], out: int, element: int) -> cost.Measured:
    """What a card would take that is exactly as the model says."""
    channels, voxels = sizes[1], sizes[0] * sizes[2] * sizes[3] * sizes[4]
    figures = channels, out, voxels, element
    products = 3 * upsample_conv_cost.factorised_flops(channels, out, voxels) / MACHINE.products[element]
    convolutions = 3 * upsample_conv_cost.direct_flops(channels, out, voxels) / MACHINE.convolutions[element]
    direct, factorised = MACHINE.direct(*figures), MACHINE.factorised(*figures)
    return cost.Measured(name, channels, out, voxels, element, direct, convolutions, factorised, products)


def test_the_fit_finds_the_machine_behind_the_times() -> None:
    found = [_as_timed(name, *layer, element) for name, layer in cost.LAYERS.items() for element in (2, 4)]
    fitted = cost.fit(found, MACHINE.bandwidth, MACHINE.lanes)
    machine = upsample_conv_cost.parse_machine({**fitted, "chosen": "fitted"}, "fitted")
    for field in dataclasses.fields(MACHINE):
        assert getattr(machine, field.name) == pytest.approx(getattr(MACHINE, field.name), rel=1e-6)
    choices = cost.compare(found, machine)
    assert all(choice.chosen == choice.faster and choice.lost == 0 for choice in choices)


def test_factors_are_never_negative() -> None:
    found = [_as_timed(name, *layer, element) for name, layer in cost.LAYERS.items() for element in (2, 4)]
    # Longer for 2 bytes an element than for 4: no bandwidth explains it.
    found = [dataclasses.replace(one, factorised=one.products + 1e-12 * one.voxels / one.element) for one in found]
    fitted = cost.fit(found, MACHINE.bandwidth, MACHINE.lanes)
    assert fitted["factorised_moves"] >= 0
    assert fitted["instructions"] >= 0


def test_a_wrong_choice_is_reported_with_its_price() -> None:
    one = _as_timed("layer", (1, 256, 24, 24, 24), 256, 2)
    slow = dataclasses.replace(one, factorised=2.0, direct=1.0)
    (choice,) = cost.compare([slow], MACHINE)
    assert (choice.chosen, choice.faster, choice.lost) == ("factorised", "direct", 1.0)
    assert "100%" in cost.table([choice])


def test_without_a_gpu_nothing_is_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the command sets, put back after the test
    before = configurations.FILE.read_text(encoding="utf-8")
    assert main(["--write"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert configurations.FILE.read_text(encoding="utf-8") == before


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--tiny", "--only", "softmax"]) == 2
    assert "--only softmax: no such kernel" in capsys.readouterr().err


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="this process's Triton compiles, and the command interprets")
def test_the_command_checks_candidates_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tuning.json"
    arguments = ["--tiny", "--only", "loss", "--out", str(file)]
    assert main(arguments) == 0
    assert "loss/contiguous: 3 candidates, 0 failed" in capsys.readouterr().out
    content = json.loads(file.read_text(encoding="utf-8"))
    assert set(content["classes"]) == {"loss/contiguous"}
    assert main(arguments) == 0
    assert "candidates" not in capsys.readouterr().out, "what is there is not done again"
