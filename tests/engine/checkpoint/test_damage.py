"""Every kind of damage is one CheckpointError that names the file: never another exception, nor wrong data."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import folder as folders
from parallel.checkpoint import files, place
from parallel.checkpoint.manifest import FILE, CheckpointError, NoCheckpointError, checksum, read_manifest
from parallel.checkpoint.read import Damaged, Reader, Target
from parallel.sharding.boxes import Box, overlapping
from tests.engine.checkpoint.making import in_child, make, tensors

SEAL = b',\n"checksum": "'
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return make(tmp_path, 1, tensors())


def read_all(step: Path) -> None:
    """As a run would: all that is wanted, then all that is there."""
    with Reader(step, threads=1) as reader:
        for name, values in tensors().items():
            assert torch.equal(reader.whole(name), values)
        reader.verify()


def refused(step: Path, *says: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_all(step)
    message = str(caught.value)
    assert str(step) in message and all(part in message for part in says), message
    return message


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_inference_mode_is_that_of_the_caller(step: Path) -> None:
    """On all threads: they may write into tensors that were made under it, part by part."""
    with Reader(step, threads=2) as reader, torch.inference_mode():
        columns = torch.empty(5, 3)
        reader.read({"weights/a": [Target(Box((0, 1), (5, 3)), columns)]})
        assert torch.equal(columns, tensors()["weights/a"][:, 1:4])


def test_what_is_well_is_read(step: Path) -> None:
    read_all(step)


@pytest.mark.parametrize("name", [FILE, "rank-00000.safetensors", "rank-00001.safetensors"])
def test_any_flipped_bit(step: Path, name: str) -> None:
    path, chosen = step / name, random.Random(name)
    good = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(good):
            for bit in chosen.sample(range(8), 2):
                os.pwrite(file.fileno(), bytes([byte ^ (1 << bit)]), at)
                refused(step, name)
            os.pwrite(file.fileno(), bytes([byte]), at)
    read_all(step)


@pytest.mark.parametrize("name", [FILE, "rank-00001.safetensors"])
def test_cut_off_at_any_byte(step: Path, name: str) -> None:
    path = step / name
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        refused(step, name)


@pytest.mark.parametrize("name", [FILE, "rank-00001.safetensors"])
def test_longer_than_it_was(step: Path, name: str) -> None:
    with (step / name).open("ab") as file:
        file.write(b"\n")
    refused(step, name)


# -- files -------------------------------------------------------------------------------------------------------------


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(to: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(to)

    return change


INSTEAD: dict[str, Callable[[Path], object]] = {
    "nothing": Path.unlink,
    "an empty file": lambda path: path.write_bytes(b""),
    "a folder": _folder,
    "a pipe": _pipe,
    "a link to itself": _link(FILE),
    "links in a circle": _link("../circle"),
    "a link to nothing": _link("nowhere"),
    "a huge file": lambda path: os.truncate(path, 1 << 40),
    "a device": _link("/dev/zero"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", INSTEAD)
@pytest.mark.parametrize("name", [FILE, "rank-00001.safetensors"])
def test_something_else_in_its_place(step: Path, name: str, what: str) -> None:
    (step.parent / "circle").symlink_to("circle")
    change = _link(name) if what == "a link to itself" else INSTEAD[what]
    change(step / name)
    refused(step, name)
    if name != FILE:
        with Reader(step, whole=False) as reader:
            found = list(reader.scan("weights/a", len))
            gone = any(isinstance(part, Damaged) and part.file == name for part in found)
            assert gone or what == "a huge file"
            assert any(not isinstance(part, Damaged) for part in found)


def test_may_not_be_read() -> None:
    """By a user who is not the superuser, who may."""
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        step = make(parent, 1, tensors())

        def denied(what: Callable[[], object]) -> None:
            with pytest.raises(CheckpointError, match="Permission denied"):
                what()

        def attempts() -> None:
            super_user = os.geteuid() == 0

            def own(path: Path, mode: int) -> None:
                if super_user:
                    os.seteuid(0)
                path.chmod(mode)
                if super_user:
                    os.seteuid(65534)

            own(parent, 0o755)
            for path in (step / "rank-00001.safetensors", step / FILE):
                own(path, 0)
                denied(lambda: read_all(step))
            own(step, 0)
            denied(lambda: read_all(step))
            denied(lambda: place.newest(step))
            for mode in (0o444, 0):
                own(parent, mode)
                denied(lambda: place.steps_in(parent))
                denied(lambda: place.newest(parent))
            own(parent, 0o755)
            own(step, 0o755)

        assert in_child(attempts) == 0


def test_deleted_while_it_is_read(step: Path) -> None:
    """A reader's lock keeps it; where there are no locks, what is gone is told."""
    with Reader(step) as reader:
        assert not folders.delete(step)
        shutil.rmtree(step)
        with pytest.raises(CheckpointError, match=r"rank-0000\d\.safetensors cannot be read"):
            reader.whole("weights/a")


def test_deleted_and_made_anew_between_lock_and_reading(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def slow(file: int, how: int) -> None:
        (step / FILE).rename(step / "old")
        shutil.copyfile(step / "old", step / FILE)

    monkeypatch.setattr(fcntl, "flock", slow)
    refused(step, "is being deleted")


# -- manifests that say what cannot be ---------------------------------------------------------------------------------


def sealed(body: bytes) -> bytes:
    return body + SEAL + checksum(body).encode() + b'"\n}\n'


def rewrite(step: Path, change: Change) -> None:
    """Change what the manifest says, and make its checksum right."""
    values = json.loads((step / FILE).read_text())
    del values["checksum"]
    change(values)
    (step / FILE).write_bytes(sealed(json.dumps(values).encode()[:-1]))


def _set(*keys: Any, to: Any) -> Change:
    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = to

    return change


def _without(*keys: Any) -> Change:
    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        del values[keys[-1]]

    return change


def _of_a(values: Any) -> list[Any]:
    return values["tensors"]["weights/a"]["pieces"]


A = ("tensors", "weights/a")
PIECE = (*A, "pieces", 0)
WRONG: dict[str, Change] = {
    **{f"no {key}": _without(key) for key in ("step", "progress", "config", "about", "evaluation", "files", "tensors")},
    **{f"no {key}": _without(key) for key in ("chunk_bytes", "checksums")},
    **{f"no {key} of a tensor": _without(*A, key) for key in ("dtype", "shape", "pieces")},
    **{f"no {key} of a piece": _without(*PIECE, key) for key in ("file", "offset", "shape", "start", "checksums")},
    **{f"no {key} of a file": _without("files", 0, key) for key in ("name", "bytes", "header")},
    "a step that is a text": _set("step", to="1"),
    "a step that is true": _set("step", to=True),
    "a step below 0": _set("step", to=-1),
    "a huge step": _set("step", to=10**400),
    "a config that is a list": _set("config", to=[]),
    "a config that is deep": _set("config", to=json.loads('{"a":' * 300 + "1" + "}" * 300)),
    "an evaluation of texts": _set("evaluation", to={"loss": "low"}),
    "tensors in a list": _set("tensors", to=[]),
    "files in an object": _set("files", to={}),
    "a tensor that is null": _set(*A, to=None),
    "a file that is a number": _set("files", 0, to=3),
    "other chunks": _set("chunk_bytes", to=1),
    "other checksums": _set("checksums", to="crc32"),
    "an unknown dtype": _set(*A, "dtype", to="F8"),
    "a dtype that is a list": _set(*A, "dtype", to=["F32"]),
    "a shape below 0": _set(*A, "shape", to=[-5, -6]),
    "a shape of 0": _set(*A, "shape", to=[5, 0]),
    "a shape of fractions": _set(*A, "shape", to=[5.0, 6.0]),
    "a huge shape": _set(*A, "shape", to=[10**30, 6]),
    "a shape of more dimensions": _set(*A, "shape", to=[5, 6, 1]),
    "a shape of thousands of dimensions": _set(*A, "shape", to=[1] * 5000),
    "a larger shape": _set(*A, "shape", to=[6, 6]),
    "a smaller shape": _set(*A, "shape", to=[4, 6]),
    "a shape that is turned": _set(*A, "shape", to=[6, 5]),
    "another dtype": _set(*A, "dtype", to="F64"),
    "no piece": _set(*A, "pieces", to=[]),
    "a piece less": lambda values: _of_a(values).pop(),
    "a piece twice": lambda values: _of_a(values).append(_of_a(values)[0]),
    "one piece in place of another": lambda values: _of_a(values).__setitem__(2, _of_a(values)[1]),
    "an offset below 0": _set(*PIECE, "offset", to=[-1, 0]),
    "an offset beyond": _set(*PIECE, "offset", to=[4, 0]),
    "an offset of one number": _set(*PIECE, "offset", to=[0]),
    "a piece of a huge shape": _set(*PIECE, "shape", to=[10**30, 6]),
    "a piece in a file below 0": _set(*PIECE, "file", to=-1),
    "a piece in a file beyond": _set(*PIECE, "file", to=2),
    "a piece before the file": _set(*PIECE, "start", to=-8),
    "a piece in the length of the header": _set(*PIECE, "start", to=0),
    "a piece beyond the file": _set(*PIECE, "start", to=1 << 20),
    "a piece far beyond the file": _set(*PIECE, "start", to=1 << 70),
    "a checksum less": _set(*PIECE, "checksums", to=[]),
    "a checksum more": _set(*PIECE, "checksums", to=["0" * 16] * 2),
    "a checksum that is a number": _set(*PIECE, "checksums", to=[7]),
    "another checksum": _set(*PIECE, "checksums", to=["0" * 16]),
    "another checksum of a header": _set("files", 0, "header", to="0" * 16),
    "no checksum of a header": _set("files", 0, "header", to="none"),
    "a file of no length": _set("files", 0, "bytes", to=0),
    "a file of another length": _set("files", 0, "bytes", to=1 << 20),
    "a file of a huge length": _set("files", 0, "bytes", to=1 << 80),
    "two files of one name": _set("files", 0, "name", to="rank-00001.safetensors"),
    "a name that cannot be printed": lambda values: values["tensors"].update({"\x1b[2J": values["tensors"][A[1]]}),
    **{
        f"the name {name[:30]!r}": _set("files", 0, "name", to=name)
        for name in (
            "../step-00000001/rank-00000.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "a\nb",
            FILE, "x" * 5000, "rank-\u0660.safetensors",
        )
    },
}  # fmt: skip


POSSIBLE = (
    "another checksum",
    "another dtype",
    "another checksum of a header",
    "a file of another length",
)  # only the files tell


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_that_cannot_be(step: Path, what: str) -> None:
    read_manifest(step)
    rewrite(step, WRONG[what])
    message = refused(step)
    if what not in POSSIBLE:
        with pytest.raises(CheckpointError, match=FILE):
            read_manifest(step)
    assert len(message) < 1000


def test_a_manifest_that_is_written_otherwise(step: Path) -> None:
    """It is what it says that counts; other keys may be there."""
    rewrite(step, lambda values: values.update(more=[1]))
    read_all(step)


def test_keys_that_are_there_twice(step: Path) -> None:
    body = (step / FILE).read_bytes().rpartition(SEAL)[0]
    assert body.count(b'"step": 1,') == 1
    (step / FILE).write_bytes(sealed(body.replace(b'"step": 1,', b'"step": 1, "step": 2,')))
    refused(step, FILE)


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"null", b"", b"\xff\xfe{}", b'{"step": ' + b"9" * 5000 + b"}", b"\0"],
    ids=["lists in lists", "objects in objects", "a list", "null", "nothing", "no UTF-8", "many digits", "a null byte"],
)
def test_texts_that_are_no_manifest(step: Path, text: bytes) -> None:
    (step / FILE).write_bytes(text)
    refused(step, FILE)
    (step / FILE).write_bytes(sealed(text))
    refused(step, FILE)


def test_another_format(step: Path) -> None:
    for seal in (True, False):
        (step / FILE).write_bytes(b'{"name": "an app"}' if seal else sealed(b'{"format": "zip"'))
        with pytest.raises(NoCheckpointError, match="not of a checkpoint of this program"):
            read_manifest(step)


def test_a_newer_version_is_named_so(step: Path) -> None:
    """Also where someone has only changed the number, or what a newer program writes is sealed otherwise."""
    rewrite(step, lambda values: values.update(format_version=7))
    with pytest.raises(NoCheckpointError, match="has format version 7, and this program reads 1"):
        read_manifest(step)
    text = (step / FILE).read_text()
    (step / FILE).write_text(text.replace('"format_version": 7', '"format_version": 8'))
    with pytest.raises(NoCheckpointError, match=r"has format version 8.*its checksum is wrong"):
        read_manifest(step)


# -- what is wanted ----------------------------------------------------------------------------------------------------


def test_what_is_not_in_it(step: Path) -> None:
    with Reader(step) as reader:
        for name, box in (
            ("weights/x", Box((0,), (1,))),
            ("weights/a", Box((0,), (1,))),
            ("weights/b", Box((4,), (2,))),
        ):
            with pytest.raises(CheckpointError, match=name):
                reader.read({name: [Target(box, torch.empty(box.shape))]})
        with pytest.raises(CheckpointError, match="weights/x"):
            reader.whole("weights/x")


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as ranks that saved; they are read by several threads."""
    values = {f"weights/{number}": torch.randn(40, 3) for number in range(5)}
    step = make(tmp_path, 1, values, files=40)
    monkeypatch.setattr(files, "_MOST_OPEN", 3)

    def open_files() -> int:
        links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(step in link.parents and link.name != FILE for link in links)

    with Reader(step, threads=8) as reader:
        for _ in range(3):
            found = {name: torch.empty(40, 3) for name in values}
            whole = Box((0, 0), (40, 3))
            assert reader.read({name: [Target(whole, tensor)] for name, tensor in found.items()}) == 5 * 480
            assert all(torch.equal(found[name], tensor) for name, tensor in values.items())
            reader.verify()
            assert not any(isinstance(part, Damaged) for name in values for part in reader.scan(name, len))
            assert 0 < open_files() <= 3 + 8
    assert not open_files()


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    """JSON has none of them."""
    step = make(tmp_path, 1, tensors(), evaluation={"loss": float("nan"), "accuracy": 0.5})
    assert read_manifest(step).evaluation == {"accuracy": 0.5}


def test_overlapping_boxes_are_found() -> None:
    chosen = random.Random(0)
    for _ in range(300):
        boxes = []
        for _ in range(chosen.randrange(6)):
            offset = [chosen.randrange(4) for _ in range(3)]
            boxes.append(Box(tuple(offset), tuple(chosen.randrange(1, 5 - o) for o in offset)))
        some = any(a.common(b) for i, a in enumerate(boxes) for b in boxes[:i])
        found = overlapping(boxes)
        assert (found is not None) == some and (found is None or found[0].common(found[1]))
    assert overlapping([Box((), ()), Box((), ())]) and not overlapping([Box((), ())])
