"""A preparation from its source to a store: everything is in it or listed, and the same command goes on."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from decovae.data.nifti import open_nifti
from decovae.data.patches import load_volume
from decovae.data.store import open_store, store_checksum
from decovae.data.store_check import verify_store
from decovae.errors import InputError, RunError
from decovae.files import locked
from decovae.preparation import run as module
from decovae.preparation.rules import Rules
from decovae.preparation.run import prepare
from decovae.preparation.splits import Splits
from decovae.preparation.survey import SurveyOptions
from decovae.preparation.tables import TableOptions
from decovae.preparation.volume import Preparation
from tests.data.files import write
from tests.preparation.sources import SMALL, brain, config, contents, make_bids, make_mixed, make_volumes
from tests.preparation.tasks import prepare_or_die


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "store"


def excluded(folder: Path) -> list[dict[str, str]]:
    with (folder / "excluded.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def prepared_sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the sources of all volumes that are prepared from now on."""
    seen = []
    original = module.prepare_one

    def watch(candidate, **options):  # type: ignore[no-untyped-def]
        seen.append(candidate.source)
        return original(candidate, **options)

    monkeypatch.setattr(module, "prepare_one", watch)
    return seen


def test_everything_found_is_in_the_store_or_listed(source: Path, out: Path) -> None:
    make_mixed(source, 5)
    outcome = prepare(config(source, out))
    stored = [record.source for record in open_store(out).records]
    listed = [row["source"] for row in excluded(out)]
    assert sorted(stored + listed) == sorted(path.name for path in source.iterdir())
    assert sorted(listed) == ["constant.nii", "cut off.nii.gz", "empty.nii", "sub-00_T1w.nii"]
    reasons = {row["source"]: row["reason"] for row in excluded(out)}
    assert "copy.nii of subject copy" in reasons["sub-00_T1w.nii"]
    assert not any(str(source) in reason for reason in reasons.values()), "no absolute paths"
    assert {row["kind"] for row in excluded(out)} == {"problem"}
    assert len(outcome.problems) == 4
    assert verify_store(out, 1) == []


def test_volumes_are_those_that_training_on_the_folder_sees(source: Path, out: Path) -> None:
    make_volumes(source, 3)
    prepare(config(source, out))
    store, folder = open_store(out), open_nifti(source, patch=(1, 1, 1))
    assert [record.subject for record in store.records] == [record.subject for record in folder.records]
    for index in range(3):
        ours, theirs = (load_volume(volumes, index, SMALL.grid) for volumes in (store, folder))
        np.testing.assert_allclose(ours, theirs, atol=2**-11)


def test_the_same_volumes_give_the_same_bytes(source: Path, out: Path, tmp_path: Path) -> None:
    make_mixed(source, 5)
    (tmp_path / "moved").symlink_to(source)
    prepare(config(source, out, split=Splits(validation=0.2)))
    prepare(config(tmp_path / "moved", tmp_path / "again", split=Splits(validation=0.2), workers=2))
    assert contents(out) == contents(tmp_path / "again")
    assert store_checksum(out) == store_checksum(tmp_path / "again")
    for name in ("store.json", "index.jsonl", "report.json"):
        assert str(tmp_path) not in (out / name).read_text()


def test_the_same_command_again_prepares_nothing(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_volumes(source, 4)
    prepare(config(source, out))
    before = contents(out)
    seen = prepared_sources(monkeypatch)
    prepare(config(source, out))
    assert seen == []
    assert contents(out) == before


def test_what_changed_is_prepared_anew(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = make_volumes(source, 4)
    prepare(config(source, out))
    write(paths[1], brain(99))  # another volume
    os.utime(paths[2], ns=(1, 1))  # only another time
    paths[3].unlink()
    write(source / "sub-09_T1w.nii", brain(9))
    seen = prepared_sources(monkeypatch)
    outcome = prepare(config(source, out))
    assert sorted(seen) == [paths[1].name, paths[2].name, "sub-09_T1w.nii"]
    assert any("2 volumes of an earlier preparation were removed" in note for note in outcome.notes)
    prepare(config(source, tmp_path / "anew"))
    assert contents(out) == contents(tmp_path / "anew")


def test_a_file_that_was_lost_is_made_again(source: Path, out: Path) -> None:
    make_volumes(source, 3)
    prepare(config(source, out))
    before = contents(out)
    lost, cut, *_ = sorted((out / "volumes").rglob("*.npy"))
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    assert len(verify_store(out, 1)) == 2
    prepare(config(source, out))
    assert contents(out) == before


def test_a_store_stays_what_it_was_until_it_is_whole_again(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_volumes(source, 3)
    prepare(config(source, out))
    before, old = store_checksum(out), open_store(out)
    changed = [entry.subject for entry in old.records].index("sub-01")
    kept = tmp_path / "kept.nii"
    shutil.copy2(paths[1], kept)
    write(paths[1], brain(99))

    def fail(*_: object, **__: object) -> None:
        raise RunError("no room")

    monkeypatch.setattr(module, "finish_store", fail)
    with pytest.raises(RunError, match="no room"):
        prepare(config(source, out))
    assert store_checksum(out) == before
    assert all(old.file(index).is_file() for index in range(3)), "beside the new volume, of another name"
    monkeypatch.undo()

    shutil.copy2(kept, paths[1])  # as if nothing had been
    prepare(config(source, out))
    assert store_checksum(out) == before
    assert verify_store(out, 1) == []

    write(paths[1], brain(99))
    prepare(config(source, out))
    assert verify_store(out, 1) == []
    with pytest.raises(InputError, match="cannot be read"):  # of a store from before: never other voxels
        old.read(changed)


def test_a_copy_is_not_prepared_again(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_volumes(source, 2)
    shutil.copy2(paths[0], source / "sub-77_T1w.nii")
    prepare(config(source, out))
    seen = prepared_sources(monkeypatch)
    outcome = prepare(config(source, out))
    assert not seen
    assert [each.subject for each in outcome.problems] == ["sub-77"]
    assert verify_store(out, 1) == []


@pytest.mark.parametrize("damage", [b'{"source": "sub-0', b"\xff\xfe{}", b"\n[]\nnull\n{}\n", b'{"source":1}\n'])
def test_a_torn_journal_costs_its_torn_line(
    source: Path, out: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_volumes(source, 3)
    prepare(config(source, out))
    before = contents(out)
    journal = out / "progress.jsonl"
    *lines, last = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines) + damage + (b"" if damage.endswith(b"\n") else last[:7]))
    for expected in (1, 0):
        seen = prepared_sources(monkeypatch)
        prepare(config(source, out))
        assert len(seen) == expected
        assert contents(out) == before
        monkeypatch.undo()


def test_other_settings_need_another_folder(source: Path, out: Path) -> None:
    make_volumes(source, 3)
    prepare(config(source, out))
    before = contents(out)
    other = Preparation(grid=(8, 10, 8), fit="resample")
    with pytest.raises(
        InputError, match=r"--volume.fit resize instead of resample, --volume.grid 8 10 6 instead of 8 10 8"
    ):
        prepare(config(source, out, volume=other))
    assert contents(out) == before


def test_rules_and_splits_may_change(source: Path, out: Path, tmp_path: Path) -> None:
    make_volumes(source, 6)
    (tmp_path / "list.txt").write_text("sub-03\n")
    prepare(config(source, out))
    changed = {"exclude": Rules(subjects=tmp_path / "list.txt"), "split": Splits(validation=0.2, test=0.2)}
    prepare(config(source, out, **changed))
    assert [row["source"] for row in excluded(out)] == ["sub-03_T1w.nii.gz"]
    assert [row["kind"] for row in excluded(out)] == ["rule"]
    splits = [record.columns["split"] for record in open_store(out).records]
    assert sorted(splits) == ["test", "train", "train", "train", "validation"]
    assert verify_store(out, 1) == []
    prepare(config(source, tmp_path / "anew", **changed))
    assert contents(out) == contents(tmp_path / "anew")
    prepare(config(source, out))
    assert len(open_store(out).records) == 6


@pytest.mark.parametrize("listed", [range(4), range(2)], ids=["everybody", "too many to split"])
def test_whoever_withdrew_is_gone_though_the_rest_is_refused(
    source: Path, out: Path, tmp_path: Path, listed: range
) -> None:
    make_volumes(source, 4)
    splits = Splits(validation=0.25, test=0.25)
    prepare(config(source, out, split=splits, pictures=True))
    withdrawn = tmp_path / "withdrawn.txt"
    withdrawn.write_text("".join(f"{number:02d}\n" for number in listed))
    with pytest.raises(InputError):
        prepare(config(source, out, split=splits, exclude=Rules(subjects=withdrawn)))
    assert not (out / "store.json").exists()
    assert not (out / "index.jsonl").exists()
    assert not (out / "accepted.png").exists()
    assert len(list((out / "volumes").rglob("*.npy"))) == 4 - len(listed)
    prepare(config(source, out, split=splits))
    assert len(open_store(out).records) == 4


def test_a_store_is_not_replaced_by_another_folder_s(source: Path, out: Path, tmp_path: Path) -> None:
    make_volumes(source, 3)
    prepare(config(source, out))
    before = contents(out)
    write(tmp_path / "other" / "sub-77_T1w.nii", brain(1))
    with pytest.raises(InputError, match=r"holds other volumes, sub-00_T1w\.nii among them"):
        prepare(config(tmp_path / "other", out))
    assert contents(out) == before


def test_a_folder_of_other_things_is_refused(source: Path, tmp_path: Path) -> None:
    make_volumes(source, 1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    (tmp_path / "file").touch()
    for out, sentence in [
        ("thesis", "holds other things, chapter.tex"),
        ("file", "is a file"),
        ("source", "other things"),
    ]:
        with pytest.raises(InputError, match=sentence):
            prepare(config(source, tmp_path / out))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_two_at_once_are_refused(source: Path, out: Path) -> None:
    make_volumes(source, 1)
    out.mkdir(parents=True)
    with locked(out / ".lock", refusal="first"), pytest.raises(InputError, match="another `decovae prepare`"):
        prepare(config(source, out))
    prepare(config(source, out))


def test_half_written_files_go(source: Path, out: Path) -> None:
    make_volumes(source, 2)
    prepare(config(source, out))
    before = contents(out)
    for folder in (out, out / "volumes" / "00"):
        folder.mkdir(exist_ok=True)
        (folder / ".half.npy.1.2.partial").write_bytes(b"half")
    prepare(config(source, out))
    assert contents(out) == before
    assert not (out / "volumes" / "00").exists()


def test_none_left_is_an_error_with_a_list(source: Path, out: Path) -> None:
    source.mkdir()
    (source / "empty.nii").touch()
    with pytest.raises(InputError, match=r"None of the 1 volumes .* empty file"):
        prepare(config(source, out))
    assert [row["source"] for row in excluded(out)] == ["empty.nii"]
    assert not (out / "store.json").exists()
    (source / "empty.nii").unlink()
    with pytest.raises(InputError, match="no volumes found"):
        prepare(config(source, out))


def test_a_wrong_option_is_found_before_any_work(source: Path, out: Path, tmp_path: Path) -> None:
    make_volumes(source, 2)
    for wrong in (
        {"split": Splits(validation=0.3, test=0.3)},  # three parts of two subjects
        {"split": Splits(validation=2)},
        {"exclude": Rules(codes=("G3O",))},
        {"exclude": Rules(where=("sexe=1",))},
        {"table": TableOptions(path=tmp_path / "none.csv")},
        {"table": TableOptions(columns=("sex",))},
        {"select": SurveyOptions(subject="(")},
        {"workers": -1},
    ):
        with pytest.raises(InputError):
            prepare(config(source, out, **wrong))
        assert not out.exists()


def test_bids(tmp_path: Path, out: Path) -> None:
    make_bids(tmp_path / "bids")
    outcome = prepare(config(tmp_path / "bids", out, split=Splits(validation=0.5)))
    store = open_store(out)
    assert [(record.subject, record.session) for record in store.records] == [
        ("sub-01", "ses-1"), ("sub-01", "ses-2"), ("sub-02", "ses-1"), ("sub-02", "ses-2")
    ]  # fmt: skip
    assert all(record.source.endswith("_T1w.nii.gz") for record in store.records)
    assert [record.columns["age"] for record in store.records] == ["63", "63", "58", "58"]
    first, second, third, fourth = (record.columns["split"] for record in store.records)
    assert first == second != third == fourth
    assert outcome.as_dict()["subjects_by_sessions"] == {"2": 2}
    assert not outcome.exclusions
    for index in range(4):
        write(tmp_path / "plain" / f"{index}.nii", brain(2 * index))
    plain = prepare(config(tmp_path / "plain", tmp_path / "plain-store"))
    assert [entry["sha256"] for entry in outcome.entries] == [entry["sha256"] for entry in plain.entries]
    other = prepare(config(tmp_path / "bids", tmp_path / "t2", select=SurveyOptions(suffix="T2w")))
    assert [entry["source"].endswith("_T2w.nii.gz") for entry in other.entries] == [True] * 4


def test_a_table_is_joined_and_only_what_is_asked_for_is_kept(source: Path, out: Path, tmp_path: Path) -> None:
    make_volumes(source, 4)
    rows = ["eid,p41270,sex,site", "00,G301|I10,1,A", "01,,0,B", "02,I64,1,A"]
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    options = {
        "table": TableOptions(path=tmp_path / "table.csv", columns=("sex",)),
        "exclude": Rules(codes=("G30",), where=("site=C",)),
    }
    outcome = prepare(config(source, out, **options))
    reasons = {row["subject"]: (row["kind"], row["reason"]) for row in excluded(out)}
    assert reasons["sub-00"][0] == "rule"
    assert "G301 (rule G30)" in reasons["sub-00"][1]
    assert reasons["sub-03"][0] == "problem"
    assert [dict(record.columns) for record in open_store(out).records] == [{"sex": "0"}, {"sex": "1"}]
    assert outcome.as_dict()["rules"] == {"rule G30": 1}
    report = json.loads((out / "report.json").read_text())
    assert (report["found"], report["prepared"]) == (4, 2)
    assert (report["excluded_by_rules"], report["excluded_by_problems"]) == (1, 1)


def test_a_manifest_may_say_more_later(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_volumes(source, 2)
    names = sorted(path.name for path in source.iterdir())
    manifest = source / "list.csv"
    manifest.write_text("path,subject\n" + "".join(f"{name},a\n" for name in names))
    prepare(config(manifest, out))
    manifest.write_text("path,subject,split,site\n" + "".join(f"{name},{name[:6]},TRAINING,B\n" for name in names))
    seen = prepared_sources(monkeypatch)
    prepare(config(manifest, out))
    assert seen == []
    records = open_store(out).records
    assert [record.subject for record in records] == ["sub-00", "sub-01"]
    assert [dict(record.columns) for record in records] == [{"site": "B", "split": "train"}] * 2


def test_what_cannot_be_foreseen_is_listed_too(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_volumes(source, 2)
    original = module.prepare_volume

    def moody(candidate, preparation):  # type: ignore[no-untyped-def]
        if candidate.source.startswith("sub-01"):
            raise ZeroDivisionError("1/0")
        return original(candidate, preparation)

    monkeypatch.setattr(module, "prepare_volume", moody)
    prepare(config(source, out))
    (row,) = excluded(out)
    assert "nobody foresaw (ZeroDivisionError: 1/0)" in row["reason"]
    monkeypatch.undo()
    assert not prepare(config(source, out)).exclusions, "another try may succeed"


def test_a_volume_that_kills_its_process_is_listed(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_volumes(source, 4)
    write(source / "deadly.nii", brain(9))
    monkeypatch.setattr(module, "prepare_one", prepare_or_die)
    prepare(config(source, out, workers=2))
    (row,) = excluded(out)
    assert (row["source"], row["kind"]) == ("deadly.nii", "problem")
    assert "was killed, probably for want of memory" in row["reason"]
    monkeypatch.undo()
    prepare(config(source, out))
    assert not excluded(out)
    assert len(open_store(out).records) == 5


def test_a_full_disk_ends_it(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_volumes(source, 3)
    calls = []
    original = module.write_volume

    def full(folder, prepared):  # type: ignore[no-untyped-def]
        calls.append(prepared)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(folder, prepared)

    monkeypatch.setattr(module, "write_volume", full)
    with pytest.raises(RunError, match="No space left on device"):
        prepare(config(source, out))
    calls.clear()
    monkeypatch.setattr(module, "write_volume", original)
    prepare(replace(config(source, out)))
    assert len(open_store(out).records) == 3
