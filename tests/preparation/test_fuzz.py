"""Whatever is in the files, preparing them ends, and each is in the store or in the list of what is not."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decovae.data.file_bytes import printable
from decovae.errors import InputError
from decovae.preparation.config import PrepareConfig
from decovae.preparation.run import prepare
from decovae.preparation.volume import Preparation

MIB = 1 << 20
LIMIT = 8 * MIB
SHAPE = (5, 7, 6)
DTYPES = ("<i2", ">i2", "u1", "<f4", ">f8")
INTEGERS = (0, 1, -1, 2, 3, 4, 7, 16, 32, 255, 348, 352, 540, 1000, 10**6, 2**15 - 1, 2**31 - 1, 2**63 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-30, 1e30, 3e38, float("nan"), float("inf"), float("-inf"), 352.0, 353.5)
TELLING = "dim datatype pixdim vox_offset scl_slope scl_inter qform_code sform_code quatern_b srow_x magic".split()
STEMS = ("scan", "sub-01_ses-2_T1w", "Größe 3", "a\nb", "'; --", "x" * 200, ".hidden", "\udcff\udcfe", 'ä\u0308,"')
ENDS = (".nii", ".nii.gz", ".NII.GZ", ".nii.gz.nii", ".hdr", ".img", ".img.gz", ".mgz")

short = settings(max_examples=100, derandomize=True, database=None, deadline=None)
long = settings(max_examples=2000, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def valid(dtype: str, *, version: int, paired: bool) -> tuple[bytes, bytes]:
    """The header, with what is between it and the voxels, and the voxels of a good volume."""
    volume = np.random.default_rng(0).gamma(2.0, 20.0, SHAPE).astype(dtype)
    kinds = ((nib.Nifti1Image, nib.Nifti1Pair), (nib.Nifti2Image, nib.Nifti2Pair))
    kind = kinds[version - 1][paired]
    header = kind.header_class(endianness=dtype[0] if dtype[0] in "<>" else "<")
    header.set_data_dtype(volume.dtype)
    header.set_data_shape(SHAPE)
    header.set_sform(np.diag([1.5, -1.0, 2.0, 1.0]), 1)
    header.set_qform(np.diag([1.5, -1.0, 2.0, 1.0]), 1)
    if not paired:
        header["vox_offset"] = header.single_vox_offset
    gap = b"" if paired else bytes(header.single_vox_offset - header.sizeof_hdr)
    return header.binaryblock + gap, volume.tobytes(order="F")


@st.composite
def headers(draw: st.DrawFn, content: bytes, version: int, order: str) -> bytes:
    """A header with some of its fields set to something else."""
    kind = (nib.Nifti1Header, nib.Nifti2Header)[version - 1]
    size = kind.sizeof_hdr
    fields = np.frombuffer(content[:size], kind.template_dtype.newbyteorder(order)).copy()
    names = st.sampled_from(TELLING) | st.sampled_from(fields.dtype.names)
    for name in draw(st.lists(names, min_size=1, max_size=3)):
        field = fields[name].reshape(-1)
        place = draw(st.integers(0, field.size - 1))
        if field.dtype.kind == "f":
            with np.errstate(all="ignore"):
                field[place] = draw(st.sampled_from(FLOATS) | st.floats(width=32))
        elif field.dtype.kind in "iu":
            bits = 8 * field.dtype.itemsize
            value = draw(st.sampled_from(INTEGERS) | st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
            field[place] = np.int64(value % 2**63).astype(field.dtype)
        else:
            field[place] = draw(st.binary(max_size=field.dtype.itemsize))
    return fields.tobytes() + content[size:]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were changed, cut off or added."""
    changed = bytearray(content)
    for place, value in draw(
        st.lists(st.tuples(st.integers(0, max(len(content) - 1, 0)), st.integers(0, 255)), max_size=3)
    ):
        if changed:
            changed[place] = value
    end = draw(st.just(len(changed)) | st.integers(0, len(changed)))
    return bytes(changed[:end]) + draw(st.just(b"") | st.binary(max_size=50))


def packed(content: bytes) -> bytes:
    """The content in gzip's format, without the time of day in it."""
    return gzip.compress(content, mtime=0)


def compressed(content: bytes, how: str) -> bytes:
    """The content, compressed in one of the ways that occur."""
    if how == "members":
        half = len(content) // 2
        return b"".join(map(packed, (content[:half], b"", content[half:]))) + bytes(20)
    for _ in range({"plain": 0, "once": 1, "twice": 2}[how]):
        content = packed(content)
    return content


@st.composite
def folders(draw: st.DrawFn) -> dict[str, bytes]:
    """Names and contents of up to three files."""
    files: dict[str, bytes] = {}
    for _ in range(draw(st.integers(1, 3))):
        dtype, version, paired = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 2)), draw(st.booleans())
        header, voxels = valid(dtype, version=version, paired=paired)
        harm = draw(st.sampled_from(("none", "header", "header", "header", "bytes", "compressed")))
        if harm == "header":
            header = draw(headers(header, version, ">" if dtype[0] == ">" else "<"))
        stem = draw(st.sampled_from(STEMS)) + str(len(files))
        how = draw(st.sampled_from(("plain", "once", "members", "twice") if harm == "none" else ("plain", "once")))
        parts = [(".hdr", header), (".img", voxels)] if paired else [(draw(st.sampled_from(ENDS)), header + voxels)]
        for end, content in parts:
            content = draw(damaged(content)) if harm == "bytes" else content
            content = compressed(content, how)
            files[stem + end] = draw(damaged(content)) if harm == "compressed" else content
    return files


def accounted(folder: Path, files: dict[str, bytes]) -> None:
    """Prepare the files, and find each of them again."""
    source, out = folder / "in", folder / "out"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    config = PrepareConfig(
        source=source, out=out, workers=0, pictures=False, volume=Preparation(grid=(4, 4, 4), limit_gib=LIMIT / 2**30)
    )
    taken: set[str] = set()
    message = ""
    try:
        prepare(config)
        taken = {json.loads(line)["source"] for line in (out / "index.jsonl").read_text("utf-8").splitlines()}
    except InputError as error:
        message = str(error)
    looked_at = {printable(name).replace(".hdr", ".img") for name in files if not name.startswith(".")}
    reasons: dict[str, str] = {}
    if looked_at:
        with (out / "excluded.csv").open(newline="", encoding="utf-8") as file:
            reasons = {row["source"]: row["reason"] for row in csv.DictReader(file)}
    left_out = {source.replace(".hdr", ".img") for source in reasons}
    assert taken | left_out == looked_at
    assert not taken & left_out
    assert bool(message) != bool(taken)
    assert all(reason.endswith(".") and str(folder) not in reason for reason in reasons.values()), reasons
    assert not any("nobody foresaw" in reason for reason in reasons.values()), reasons


def check(files: dict[str, bytes]) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("error")
            accounted(Path(folder), files)
        assert tracemalloc.get_traced_memory()[1] < 16 * LIMIT
        assert not records
    finally:
        tracemalloc.stop()
        logging.getLogger().removeHandler(handler)


@short
@given(folders())
def test_every_file_is_in_the_store_or_excluded_with_a_reason(files: dict[str, bytes]) -> None:
    check(files)


@pytest.mark.slow
@long
@given(folders())
def test_every_one_of_thousands_of_files_is_accounted_for(files: dict[str, bytes]) -> None:
    check(files)
