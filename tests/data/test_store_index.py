"""The index costs a process nothing that grows with the number of volumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from decovae.data.store import open_store
from decovae.data.store_index import canonical
from decovae.preparation.writer import finish_store
from tests.data.stores import GRID, entry_of


class PrivateMemory(Dataset[int]):
    """KiB of a worker's own memory, after it has touched every record."""

    def __init__(self, folder: Path) -> None:
        self.volumes = open_store(folder)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        assert sum(len(record.columns) for record in self.volumes.records) == len(self.volumes.records)
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Private_Dirty"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="tells memory by Linux' /proc")
def test_a_workers_memory_does_not_depend_on_the_number_of_volumes(tmp_path: Path) -> None:
    """At the 25,252 volumes that UK Biobank gave; a list of the records would be 47 MB."""
    taken = []
    for count in (100, 25_252):
        folder = tmp_path / str(count)
        folder.mkdir()
        finish_store(folder, (entry_of(index) for index in range(count)), {}, grid=GRID)
        loader = DataLoader(PrivateMemory(folder), batch_size=None, num_workers=1)
        taken.extend(int(each) for each in loader)
    assert taken[1] - taken[0] < 4096


def test_canonical_json_is_one_line_of_ascii() -> None:
    assert canonical({"b": [1.5, "é\n"], "a": None}) == '{"a":null,"b":[1.5,"\\u00e9\\n"]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))
