"""An evaluation on disk is JSON that every reader takes, and says what it left out."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from decovae.evaluation.outputs import EVALUATION, VOLUMES, partial_sentence, write_evaluation


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    rows = [{"volume": "a", "psnr": math.inf}, {"volume": "b", "psnr": 20.5, "lpips": math.nan}]
    write_evaluation({"measures": [{"psnr": math.inf, "ssim": 1.0}], "note": "µ"}, rows, tmp_path / "new")
    text = (tmp_path / "new" / EVALUATION).read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"measures": [{"psnr": None, "ssim": 1.0}], "note": "µ"}
    with (tmp_path / "new" / VOLUMES).open() as file:
        assert list(csv.DictReader(file)) == [
            {"volume": "a", "psnr": "", "lpips": ""},
            {"volume": "b", "psnr": "20.5", "lpips": ""},
        ]


@pytest.mark.parametrize(
    ("used", "said"),
    [
        ({"volumes": (40, 40)}, None),
        ({"volumes": (12, 40)}, "12 of 40 volumes: --limit 12"),
        ({"real volumes": (12, 12), "samples": (12, 30)}, "12 of 30 samples: --limit 12"),
        ({"volumes": (12, 13), "samples": (12, 30)}, "12 of 13 volumes and 12 of 30 samples: --limit 12"),
    ],
)
def test_how_partial_it_is(used: dict[str, tuple[int, int]], said: str | None) -> None:
    assert partial_sentence(used, 12) == said
