"""Files of tensors: what is read of each kind, and what is refused: damaged, ambiguous, or with code in it."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.formats.base import ConversionError
from model.formats.sources import Source, open_source

TENSORS = {
    "a": torch.arange(60.0).reshape(5, 3, 4),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
}


def save_npz(path: Path, compressed: bool = False) -> None:
    arrays = {"a": TENSORS["a"].numpy(), "b": TENSORS["b"].view(torch.int16).numpy().view("V2"), "c": np.array(7)}
    (np.savez_compressed if compressed else np.savez)(path, allow_pickle=False, **arrays)


def save_index(folder: Path) -> None:
    """Two shards of safetensors, and which is where."""
    save_file({"a": TENSORS["a"]}, folder / "model-1.safetensors")
    save_file({name: TENSORS[name] for name in ("b", "c")}, folder / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


WAYS: dict[str, Callable[[Path], None]] = {
    "safetensors": lambda folder: save_file(TENSORS, folder / "x.safetensors"),
    "sharded": save_index,
    "torch": lambda folder: torch.save({"epoch": 3, "state_dict": TENSORS}, folder / "x.pth"),
    "torch_of_ddp": lambda folder: torch.save({f"module.{k}": v for k, v in TENSORS.items()}, folder / "x.bin"),
    "old_torch": lambda folder: torch.save(TENSORS, folder / "x.pt", _use_new_zipfile_serialization=False),
    "npz": lambda folder: save_npz(folder / "x.npz"),
    "compressed_npz": lambda folder: save_npz(folder / "x.npz", compressed=True),
}


@pytest.mark.parametrize("save", WAYS.values(), ids=WAYS)
def test_read(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path)
    source = open_source(tmp_path)
    assert {name: (e.shape, e.dtype) for name, e in source.tensors.items()} == {
        name: (tuple(x.shape), x.dtype) for name, x in TENSORS.items()
    }
    for name, x in TENSORS.items():
        assert torch.equal(source.read(name), x)
    assert torch.equal(source.read("a", 3), TENSORS["a"][3])
    source.read("a").zero_()
    assert torch.equal(source.read("a"), TENSORS["a"])  # what was read is nobody else's


def test_other_byte_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(3, dtype=">f4"))
    assert open_source(tmp_path).read("a").tolist() == [0, 1, 2]


def test_files_beside(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"depth": 2}')
    (tmp_path / "tokenizer.json").write_text("no matter")
    assert open_source(tmp_path / "model.safetensors").files == {"config.json": {"depth": 2}}
    (tmp_path / "other.json").write_text('{"depth": 3}')
    assert open_source(tmp_path, tmp_path / "other.json").files["config.json"] == {"depth": 3}


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "old.pth", "npz", "compressed.npz"])
def test_a_torn_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        save_file(TENSORS, path)
    elif suffix.endswith("pth"):
        torch.save(TENSORS, path, _use_new_zipfile_serialization=suffix == "pth")
    else:
        save_npz(path, suffix != "npz")
    data = path.read_bytes()
    for left in (0, 3, 30, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:left])
        with pytest.raises(ConversionError, match="no whole"):
            open_source(path)


def test_damage_in_compressed_arrays_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.random.default_rng(0).normal(size=4000))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[8000:8400] = bytes(400)
    (tmp_path / "x.npz").write_bytes(data)
    source = open_source(tmp_path)
    with pytest.raises(ConversionError, match="a cannot be read"):
        source.read("a")


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_pickle_with_code_is_refused_and_never_runs(tmp_path: Path) -> None:
    planted = {"a": TENSORS["a"], "b": Planted(f"touch {tmp_path / 'ran'}")}
    torch.save(planted, tmp_path / "new.pt")
    torch.save(planted, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(planted["b"]))
    np.savez(tmp_path / "x.npz", a=np.array([planted["b"]], dtype=object))
    torch.save({"model": TENSORS, "args": Namespace(lr=0.1)}, tmp_path / "run.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("new.pt", "old.pt", "plain.bin", "x.npz", "run.pth"):
            with pytest.raises(ConversionError, match=r"pickle.*any code"):
                open_source(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConversionError, match=r"argparse\.Namespace.*save_file"):
        open_source(tmp_path / "run.pth")


def script(path: Path) -> None:
    """As OpenAI's own CLIP files are."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/constants.pkl", b"")


def twice(path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            with archive.open("a.npy", "w") as member:
                np.save(member, np.ones(2))


def longer(path: Path) -> None:
    """Its header says more than there is."""
    np.save(path.with_suffix(".npy"), np.ones(9))
    data = path.with_suffix(".npy").read_bytes()[:-8]
    path.with_suffix(".npy").unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", data)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "script.pt": (script, "TorchScript"),
    "tensor.pt": (lambda path: torch.save(TENSORS["a"], path), "Tensor"),
    "prefix.pt": (lambda path: torch.save({"a": TENSORS["a"], "module.a": TENSORS["b"]}, path), "a twice"),
    "sparse.pt": (lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "sparse"),
    "words.pt": (lambda path: path.write_text("words"), "no whole"),
    "words.txt": (lambda path: path.write_text("words"), r"no \.safetensors"),
    "strings.npz": (lambda path: np.savez(path, a=np.array(["x"])), "a is an array of <U1"),
    "pairs.npz": (lambda path: np.savez(path, a=np.zeros(2, [("x", "u1"), ("y", "u1")])), "a is an array of"),
    "columns.npz": (lambda path: np.savez(path, a=np.asfortranarray(np.ones((2, 3)))), "column by column"),
    "twice.npz": (twice, "two arrays a"),
    "longer.npz": (longer, "as its shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_state_dict_is_refused(name: str, tmp_path: Path) -> None:
    make, told = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(ConversionError, match=told):
        open_source(tmp_path / name)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    def refused(told: str, path: Path = tmp_path) -> None:
        with pytest.raises(ConversionError, match=told):
            open_source(path)

    refused("no checkpoint")
    refused("does not exist", tmp_path / "nothing.npz")
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(TENSORS, tmp_path / "y.pt")
    refused(r"x\.safetensors, y\.pt")
    (tmp_path / "config.json").write_text("{")
    refused("config.json is no JSON", tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text("[1]")
    refused("no JSON object", tmp_path / "x.safetensors")


INDICES: dict[str, tuple[object, str]] = {
    "missing": ({"weight_map": {"a": "model-1.safetensors", "d": "model-3.safetensors"}}, r"model-3.*not there"),
    "elsewhere": ({"weight_map": {"a": "../model-1.safetensors"}}, "not in its folder"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "not in its folder"),
    "numbers": ({"weight_map": {"a": 3}}, "no index"),
    "empty": ({"weight_map": {}}, "names no file"),
    "list": ([1], "no index"),
}


def test_indices_that_are_refused(tmp_path: Path) -> None:
    save_index(tmp_path)
    for values, told in INDICES.values():
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(values))
        with pytest.raises(ConversionError, match=told):
            open_source(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tensors_in_two_shards_are_refused(suffix: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        path = tmp_path / f"{name}.{suffix}"
        save_file({"a": TENSORS["a"]}, path) if suffix == "safetensors" else torch.save({"a": TENSORS["a"]}, path)
    places = {"a": f"one.{suffix}", "b": f"two.{suffix}"}
    (tmp_path / "model.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ConversionError, match=r"a is in (one|two)"):
        open_source(tmp_path)


def test_one_layer_of_a_stack_is_read_alone(tmp_path: Path) -> None:
    """Of mapped arrays, only the pages of the layer: a file of 64 MiB is not brought into memory for a part of it."""
    np.savez(tmp_path / "x.npz", a=np.zeros((64, 512, 512), np.float32))
    source: Source = open_source(tmp_path)
    before = resident()
    assert source.read("a", 5).shape == (512, 512)
    assert resident() - before < 16 * 2**20


def resident() -> int:
    """Bytes in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_of_several_files_the_one_is_read_that_transformers_reads(tmp_path: Path) -> None:
    """One file before shards, safetensors before a file of PyTorch."""
    index = {"weight_map": {"x": "shard.bin"}}
    torch.save({"x": torch.zeros(1)}, tmp_path / "shard.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert open_source(tmp_path).read("x") == 0
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert open_source(tmp_path).read("x") == 1
    save_file({"x": torch.full((1,), 2.0)}, tmp_path / "shard.safetensors")
    index = {"weight_map": {"x": "shard.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_source(tmp_path).read("x") == 2
    save_file({"x": torch.full((1,), 3.0)}, tmp_path / "model.safetensors")
    assert open_source(tmp_path).read("x") == 3


@pytest.mark.parametrize("header", ["{'descr': '<f4', 'fortran_order': False, 'shape': ('a',)}", "-" * 9000 + "1"])
def test_headers_of_no_sense(header: str, tmp_path: Path) -> None:
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    huge = b"\x93NUMPY\x02\x00" + (3 << 30).to_bytes(4, "little")
    for i, content in enumerate((data, huge)):
        path = tmp_path / f"{i}.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
        with pytest.raises(ConversionError, match="is no array"):
            open_source(path)
