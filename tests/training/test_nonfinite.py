"""Steps that are not finite: left out, counted, their samples named and kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from decovae.errors import RunError
from decovae.runtime import Runtime
from decovae.training.nonfinite import Skipped

CPU = Runtime(torch.device("cpu"))


class Two(Runtime):
    """A process of two; whether the other has a term that is not finite stands in ``others``."""

    others: ClassVar[list[bool]] = []

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, bool):
            return [self.others[-1], value]
        return [(["l1"], ["sub-0"], [0], "file", None) if self.others[-1] else ([], [], [], None, None), value]


def batch(*subjects: str, first: int = 0) -> dict[str, Any]:
    positions = torch.arange(first, first + len(subjects))
    return {"image": torch.full((len(subjects), 1, 2), math.nan), "subject": list(subjects), "position": positions}


def test_a_batch_is_kept_with_its_subjects(tmp_path: Path) -> None:
    skipped = Skipped(tmp_path, CPU, limit=10)
    terms = {"l1": torch.tensor(math.nan), "kl": torch.tensor(2.0), "gradient_norm_autoencoder": torch.tensor(math.nan)}
    skip = skipped.add(12, terms, [batch("sub-1", "sub-2", first=22), batch("sub-3", first=24)])
    assert skip.broken == ("l1", "gradient_norm_autoencoder")
    assert skip.subjects == ("sub-1", "sub-2", "sub-3")
    assert skip.positions == (22, 23, 24)
    (path,) = map(Path, skip.dumps)
    assert path == tmp_path / "nonfinite" / "step-00000012-rank0.pt"
    content = torch.load(path, weights_only=True)
    assert content["terms"]["kl"] == 2.0
    assert [kept["subject"] for kept in content["batches"]] == [["sub-1", "sub-2"], ["sub-3"]]
    assert content["batches"][0]["image"].isnan().all()
    for text in ("step 12", "l1", "sub-1, sub-2, sub-3", "22, 23, 24", str(path)):
        assert text in skip.sentence
    assert json.loads(json.dumps(skip.figures))["skipped_steps"] == 1


@pytest.mark.parametrize(("others", "kept"), [(True, False), (False, True)])
def test_who_has_gradients_alone_is_accused_only_where_nobody_else_is(tmp_path: Path, others: bool, kept: bool) -> None:
    runtime = Two(torch.device("cpu"), rank=1, world=2)
    runtime.others.append(others)
    skip = Skipped(tmp_path, runtime, limit=10).add(1, {"l1": 1.0, "gradient_norm_a": math.inf}, [batch("sub-1")])
    assert skip.dumps == ((str(tmp_path / "nonfinite" / "step-00000001-rank1.pt"),) if kept else ("file",))
    assert skip.subjects == (("sub-1",) if kept else ("sub-0",))


def test_the_run_stops_past_the_limit(tmp_path: Path) -> None:
    skipped = Skipped(tmp_path, CPU, limit=1)
    skipped.check()
    skipped.add(1, {"l1": math.inf}, [batch("sub-1")])
    skipped.check()
    skipped.add(5, {"l1": math.inf}, [batch("sub-2")])
    with pytest.raises(RunError, match=r"2 steps were left out, more than --skip-limit 1.*sub-2.*rank0\.pt") as caught:
        skipped.check()
    assert caught.value.on_all_processes


def test_a_batch_that_cannot_be_kept_is_no_second_error(tmp_path: Path) -> None:
    (tmp_path / "nonfinite").write_text("a file in the way")
    skip = Skipped(tmp_path, CPU, limit=1).add(1, {"l1": math.nan}, [batch("sub-1")])
    assert skip.dumps == ()
    assert "could not be dumped" in skip.sentence
