"""The benchmark of checkpoints measures what it says: every way brings the same bytes to the disk and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.assemble import assemble, grid_of
from engine.assembly import Assembly
from engine.checkpoint.states import held_pieces
from parallel.process_group import World
from tests.engine.small import small
from tools.benchmark import checkpoint, checkpoint_ways
from tools.benchmark.checkpoint_ways import all_ways, forget_pages


@pytest.fixture(scope="module")
def assembly() -> Assembly:
    config, cpu = small().resolve(1), torch.device("cpu")
    return assemble(config, grid_of(config, World(), cpu), cpu)


def test_every_way_writes_all_and_reads_it_again(assembly: Assembly, tmp_path: Path) -> None:
    size = sum(piece.values.nbytes for piece in held_pieces(assembly))
    for name, way in all_ways(assembly).items():
        state = {piece.name: piece.values.normal_().clone() for piece in held_pieces(assembly)}
        way.write(tmp_path / name)
        forget_pages(tmp_path / name)
        written = sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
        assert written >= size, name
        for piece in held_pieces(assembly):
            piece.values.zero_()
        way.read(tmp_path / name)
        back = {piece.name: piece.values for piece in held_pieces(assembly)}
        if name == "ours":
            assert all(torch.equal(back[key], values) for key, values in state.items())


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_ways, "DROP_CACHES", Path("/dev/null"))  # the whole machine's, which takes a second
    flags = "--model.width 16 --model.depth 2 --model.mlp_dim 32 --model.num_heads 2 --model.image_size 16"
    own = f"--repeats 1 --pause 0.01 --dir {tmp_path} --json {tmp_path / 'rows.json'}"
    checkpoint.main([*own.split(), *flags.split()], World())
    rows = json.loads((tmp_path / "rows.json").read_text())
    ways = ("plain", "direct", "ours", "dcp", "dcp, 2 threads")
    assert [(r["action"], r["way"]) for r in rows[:-2]] == [(a, w) for a in checkpoint.ACTIONS for w in ways]
    assert all(row["seconds"] > 0 and row["over_plain"] > 0 for row in rows[:-2])
    assert all(0 <= row["blocked_ms"] <= 1000 * row["seconds"] for row in rows[-2:])
    assert not list(tmp_path.glob("checkpoint-*"))
