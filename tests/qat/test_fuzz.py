"""Damaged files: nothing but ValueError comes out, nothing outside the folder is opened, no memory is asked for that
the files do not justify.

    FUZZ_SECONDS=600 pytest tests/qat/test_fuzz.py        each of the five targets gets a fifth of that time
"""

import json
import os
import random
import resource
import shutil
import struct
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_qat.checkpoint.check import CheckConfig
from mimo_qat.checkpoint.check import main as check
from mimo_qat.checkpoint.folder import TensorFolder
from mimo_qat.checkpoint.layout import DraftGeometry, Geometry, drafter_tensors, target_tensors
from mimo_qat.checkpoint.reader import read_draft_config, read_drafter
from mimo_qat.dialects import plan
from mimo_qat.sources import Source

LONG = float(os.environ.get("FUZZ_SECONDS", 0)) / 5
ROOM_BYTES = 2**28
SIZES = st.sampled_from([0, 1, -1, 2, 7, 2**15, 2**31, 2**63, 2**64, 10**30])
LEAVES = st.none() | st.booleans() | SIZES | st.integers() | st.floats() | st.text(max_size=6)
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3))
SECRET = "outside.safetensors"

_opened: list[str] = []
_watching = False


def _hook(event, arguments):
    if _watching and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_hook)


@contextmanager
def guarded(folder):
    """Fails for a file opened beside the folder; what asks for more than 256 MB fails with a MemoryError."""
    global _watching
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES, hard))
    _opened.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    beside = os.path.dirname(os.path.realpath(folder))
    strangers = [p for p in _opened if os.path.realpath(p).startswith(beside)]
    strangers = [p for p in strangers if not os.path.realpath(p).startswith(os.path.realpath(folder) + os.sep)]
    assert not strangers, strangers


def use(folder):
    """Everything that reads a checkpoint folder before it trusts it."""
    for action in (
        lambda: plan(Source(folder), "mimo", "even"),
        lambda: plan(Source(folder), "compressed-tensors", "even"),
        lambda: read_first(folder),
        lambda: read_drafter(folder),
    ):
        try:
            action()
        except ValueError as error:
            assert str(error)
    document = check(CheckConfig(folder=str(folder), samples=2))
    assert json.dumps(document)


def read_first(folder):
    tensors = TensorFolder(folder)
    for name in tensors.names[:5]:
        assert sum(len(piece) for piece in tensors.pieces(name)) == tensors.specs[name].nbytes
        tensors.rows(name)
    tensors.close()


def fuzz(target, *strategies, examples):
    """Runs `target` on examples of the strategies: some of them, or for the long mode's share of time."""
    runner = settings(
        max_examples=10**9 if LONG else examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not LONG,
    )
    until = time.monotonic() + LONG if LONG else float("inf")

    class Enough(BaseException):
        pass

    def once(values):
        if time.monotonic() > until:
            raise Enough
        target(*values)

    try:
        runner(given(st.tuples(*strategies))(once))()
    except Enough:
        return


@pytest.fixture
def folder(release, tmp_path):
    (tmp_path / SECRET).write_bytes(b"secret")
    return release.path


def mutated(document, path, key, value):
    """A copy of a nested document with one key of one of its objects replaced or dropped."""
    copy = json.loads(json.dumps(document))
    objects = [copy]
    for item in objects:
        objects += [v for v in item.values() if isinstance(v, dict)]
    chosen = objects[path % len(objects)]
    names = sorted(chosen) or ["x"]
    name = names[key % len(names)]
    if value == "drop":
        chosen.pop(name, None)
    else:
        chosen[name] = value
    return copy


EDIT = (st.integers(0, 3), st.integers(0, 300), VALUES | st.just("drop"))


def test_headers(folder, capsys):
    file = folder / "model_mtp.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]

    def bytes_changed(seed, count):
        dice, damaged = random.Random(seed), bytearray(data)
        for _ in range(count):
            damaged[dice.randrange(8 + length)] = dice.randrange(256)
        damaged = damaged[: dice.choice([len(damaged), dice.randrange(len(damaged))])]
        file.write_bytes(damaged)
        with guarded(folder):
            use(folder)

    def entries_changed(path, key, value, size):
        text = json.dumps(mutated(header, path, key, value)).encode()
        file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + payload)
        with guarded(folder):
            use(folder)

    try:
        fuzz(bytes_changed, st.integers(0, 2**32), st.integers(1, 4), examples=15)
        huge = st.none() | st.sampled_from([0, 2**31, 2**63, 2**64 - 1])
        fuzz(entries_changed, st.integers(0, 60), st.integers(0, 60), EDIT[2], huge, examples=25)
    finally:
        file.write_bytes(data)
    assert check(CheckConfig(folder=str(folder)))["ok"]


def test_indices(folder, capsys):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    outside = st.sampled_from([f"../{SECRET}", "/etc/passwd", ".", "", "..", f"x/../../{SECRET}", "a\0b", "x" * 5000])

    def changed(where, key, value):
        path.write_text(json.dumps(mutated(index, where, key, value)))
        with guarded(folder):
            use(folder)

    fuzz(changed, EDIT[0], EDIT[1], EDIT[2] | outside, examples=40)
    path.write_text(json.dumps(index))
    assert check(CheckConfig(folder=str(folder)))["ok"]


def test_configs(folder, capsys):
    path = folder / "config.json"
    config = json.loads(path.read_text())

    def changed(where, key, value):
        document = mutated(config, where, key, value)
        path.write_text(json.dumps(document))
        with guarded(folder):
            for action in (Geometry.from_config, target_tensors):
                try:
                    action(document)
                except ValueError as error:
                    assert str(error)
            use(folder)

    fuzz(changed, *EDIT, examples=50)
    path.write_text(json.dumps(config))
    assert check(CheckConfig(folder=str(folder)))["ok"]


@pytest.mark.filterwarnings("ignore:.*trailing comma")
def test_drafter_configs(folder, capsys):
    path = folder / "dflash" / "config.json"
    config = json.loads(path.read_text())
    scratch = folder / "dflash.scratch"

    def changed(where, key, value, tail):
        document = mutated(config, where, key, value)
        path.write_text(json.dumps(document)[: -1 if tail else None] + tail)
        with guarded(folder):
            for action in (DraftGeometry.from_config, drafter_tensors):
                try:
                    action(document)
                except ValueError as error:
                    assert str(error)
            try:
                read_draft_config(path)
            except ValueError as error:
                assert str(error)
            use(folder)

    fuzz(changed, *EDIT, st.sampled_from(["", ",}", "]", "," * 50]), examples=40)
    path.write_text(json.dumps(config))
    shutil.rmtree(scratch, ignore_errors=True)
    assert check(CheckConfig(folder=str(folder)))["ok"]
