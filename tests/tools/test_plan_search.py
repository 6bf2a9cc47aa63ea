"""The search for layouts: against every layout of small spaces, what it writes, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data import DataConfig
from engine.clusters import Cluster, read_cluster
from engine.config import Config, PrecisionConfig, RecomputeConfig, TrainConfig
from engine.config.cli import parse
from engine.config.distillation import DistillationConfig
from engine.errors import ConfigError
from engine.objectives import make_objective
from engine.passes import is_open
from engine.plan import peaks
from engine.step_time import predict_step
from model import ModelConfig
from parallel.grid import GridShape
from tools.plan import command
from tools.plan.bounds import Misfit
from tools.plan.evaluate import Evaluator, Prediction
from tools.plan.layouts import Key, Layout, Space, read_layout
from tools.plan.search import Search
from tools.plan.written import ANY_DATA, run_config

ROOT = Path(__file__).parents[2]
H100 = read_cluster(str(ROOT / "configs" / "clusters" / "h100_64.yaml"))
SMALL = Config(
    model=ModelConfig(
        width=256, depth=4, num_heads=2, mlp_dim=1024, image_size=64, patch_size=8, num_classes=16, block="parallel"
    ),
    train=TrainConfig(steps=1, global_batch_size=16),
    precision=PrecisionConfig(dtype="bf16"),
)


def of_gigabytes(gb: float) -> Cluster:
    return replace(H100, memory=replace(H100.memory, gb=gb)).of_ranks(2)


def every(space: Space) -> list[Layout]:
    return [
        Layout(
            tensor=key.tensor, sequence=key.sequence, context=key.context, pipeline=p, schedule=schedule,
            virtual=virtual, data=d, zero=zero, micro_batch=size,
        )
        for key in space.families()
        for p, d in space.pipelines(key)
        for size in space.micro_batches(key, d)
        for schedule, virtual in space.schedules(p)
        for zero in space.zeros(key, d)
    ]  # fmt: skip


@pytest.mark.parametrize(("gigabytes", "only"), [(80.0, {"micro_batch": 4}), (0.105, {"micro_batch": 4})])
def test_no_layout_is_quicker_than_the_first(gigabytes: float, only: Mapping[str, Any]) -> None:
    """Of every arrangement of ranks the best is found, in order; and no bound is above what it is a bound of."""
    space, evaluator = Space(config=SMALL, ranks=2, only=only), Evaluator(SMALL, of_gigabytes(gigabytes), 2)
    best = dict[tuple[int, ...], Prediction]()
    sizes = set[bool]()
    for layout in every(space):
        again = evaluator.least_again(layout, evaluator.budget, closely=True)
        exact = evaluator.exactly(layout)
        sizes.add(isinstance(exact, Misfit))
        if isinstance(exact, Misfit):
            assert not isinstance(again, Misfit) or again.least <= exact.least
            continue
        assert not isinstance(again, Misfit), (layout, again)
        for bound in (again, evaluator.least(layout), evaluator.least_busy(layout)):
            assert bound <= exact.seconds * (1 + 1e-9), layout
        if layout.grid not in best or exact.seconds < best[layout.grid].seconds:
            best[layout.grid] = exact
    assert sizes == {False} if gigabytes == 80.0 else {False, True}
    found = Search(space, evaluator).best(99)
    assert found.looked_at == len(every(space))
    assert [p.seconds for p in found.best] == pytest.approx(sorted(p.seconds for p in best.values()))
    counts = found.counts
    assert counts["slower"] + counts["too large"] + counts["planned"] + counts["misfits"] == found.looked_at


def test_what_is_written_runs_the_same_plan(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("given.yaml", "plan.yaml", "plan.json")]
    Path(files[0]).write_text(SMALL.to_yaml())
    cluster = str(ROOT / "configs" / "clusters" / "h100_64.yaml")
    command.main(
        ["--config", files[0], "--cluster", cluster, "--ranks", "2", "--only", "pipeline=2,schedule=1f1b,micro_batch=2",
         "--out", files[1], "--json", files[2]]
    )  # fmt: skip
    config, _ = parse(["--config", files[1]])
    assert config.parallel.pipeline_parallel_size == 2 and config.train.micro_batch_size == 2
    assert config.resolve(2).recompute.sets(4)
    layout, evaluator = read_layout("pipeline=2", config, 2, "--explain"), Evaluator(config, H100.of_ranks(2), 2)
    plain = evaluator.exactly(layout)
    assert isinstance(plain, Prediction)
    again = evaluator.cut(plain)
    assert again.seconds < plain.seconds, "the embedding is light: the first stage is given more blocks"
    assert config.parallel.layers_per_stage == again.config.parallel.layers_per_stage != (3, 3)
    assert f'"step_s": {again.seconds}' in Path(files[2]).read_text()
    config = config.resolve(2)
    run = predict_step(config, config.grid_shape(2), H100.of_ranks(2))
    assert run.seconds == pytest.approx(again.seconds)


def test_a_layout_fits_that_a_run_would_cut_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head with the weights of six blocks, and few FLOPs."""
    config = replace(SMALL, model=replace(SMALL.model, num_classes=20_000))
    layout, evaluator = Layout(pipeline=2, micro_batch=2), Evaluator(config, H100.of_ranks(2), 2)
    even, cut = (evaluator.exactly(layout, 1, cuts=cuts) for cuts in (False, True))
    assert isinstance(even, Misfit) and isinstance(cut, Misfit) and cut.least < even.least
    given = tmp_path / "given.yaml"
    given.write_text(replace(config, recompute=RecomputeConfig(policy="auto", memory_budget=cut.least)).to_yaml())
    cluster = str(ROOT / "configs" / "clusters" / "h100_64.yaml")
    argv = ["--config", str(given), "--cluster", cluster, "--ranks", "2", "--explain", "pipeline=2,micro_batch=2"]
    command.main(argv)
    assert "layers of the stages: 5, 1" in capsys.readouterr().out


@pytest.mark.parametrize(("gb_per_second", "offloads"), [(1e-6, False), (1e6, True)])
def test_a_layout_may_keep_in_host_memory_what_copies_are_quick_for(gb_per_second: float, offloads: bool) -> None:
    recompute = RecomputeConfig(policy="auto", offload="auto")
    config = replace(SMALL, model=replace(SMALL.model, depth=16), recompute=recompute)
    cluster = of_gigabytes(0.2)
    cluster = replace(cluster, host=replace(cluster.host, gb_per_second=gb_per_second))
    found = Evaluator(config, cluster, 2).exactly(Layout(data=2, zero=1, micro_batch=8))
    assert isinstance(found, Prediction)
    assert any("+offload" in name for name in found.config.recompute.policy) == offloads


def test_of_readiness_it_is_said_that_bounds_may_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "given.yaml"
    given.write_text(SMALL.to_yaml())
    command.main(
        ["--config", str(given), "--cluster", str(ROOT / "configs" / "clusters" / "h100_64.yaml"), "--ranks", "2",
         "--parallel.schedule_policy", "ready", "--only", "pipeline=2,schedule=1f1b,micro_batch=4"]
    )  # fmt: skip
    assert "bounds hold for static alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--explain", "tensr=2"], "unknown name 'tensr': did you mean tensor?"),
        (["--explain", "tensor=two"], "tensor is 'two': it must be a positive integer"),
        (["--explain", "tensor=2,zero=4"], "zero is 4: it must be 0, 1, 2 or 3"),
        (["--explain", "schedule=2f2b"], "schedule is '2f2b': choose one of gpipe, 1f1b"),
        (["--explain", "tensor=3"], "is 0 ranks, but there are 2"),
        (["--explain", "tensor=2,tensor=1"], "tensor is given twice"),
        (["--explain", "pipeline=2,micro_batch=3"], "use a global batch of"),
        (["--explain", "tensor=2,schedule=zb_v,virtual=4"], "zb_v holds 2 stages per rank"),
        (["--only", "data=2", "--train.global_batch_size", "15"], "global_batch_size 15 can be dealt"),
        (["--only", "pipeline=2,micro_batch=5"], "no layout with pipeline=2,micro_batch=5"),
        (["--recompute.policy", "auto", "--recompute.offload", "auto"], "is for one layout (--explain LAYOUT)"),
        (["--gpu-memory", "80"], "--gpu-memory has no effect with --cluster"),
        (["--model.width", "16384", "--model.depth", "16", "--model.mlp_dim", "65536", "--only", "micro_batch=1"],
         "no layout fits on 2 ranks"),
        (["--explain", "data=2", "--picture", "front.png"], "--picture is for the search, and --explain tells of one"),
        (["--picture", "nowhere/front.png"], "there is no folder nowhere"),
        (["--explain", "data=2", "--recompute.policy", "auto", "--recompute.memory_budget", "1MB"],
         "may take 0.001 of 80 GB for each: use recompute.memory_budget "),
        (["--out", "nowhere/plan.yaml"], "there is no folder nowhere"),
        (["--objective", "contrastive", "--model.num_classes", "0", "--text.width", "null"], "text.width"),
        (["--objective", "contrastive", "--model.num_classes", "0", "--contrastive.pairs", "views", "--data.views", "2",
          "--contrastive.passes", "1"], "contrastive.passes is 1, and layouts are priced with two"),
    ],
)  # fmt: skip
def test_mistakes(options: list[str], says: str, tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text(SMALL.to_yaml())
    cluster = str(ROOT / "configs" / "clusters" / "h100_64.yaml")
    with pytest.raises(ConfigError) as caught:
        command.main(["--config", str(given), "--cluster", cluster, "--ranks", "2", *options])
    assert says in str(caught.value)


@pytest.mark.parametrize("options", [["--ranks", "1", "--explain", "tensor=1"], []])
def test_a_machine_is_asked_for(options: list[str]) -> None:
    with pytest.raises(ConfigError, match="give --cluster"):
        command.main(options)


@pytest.mark.parametrize(
    ("name", "gigabytes", "only", "has_one"),
    [
        ("vit_b16", 80.0, {"context": 1}, True),
        ("vit_l16", 80.0, {"context": 1}, True),
        ("vit_g14", 80.0, {"context": 1}, True),
        ("vit_b16", 1.2, {"context": 1, "pipeline": 1, "zero": 0, "micro_batch": 8, "sequence": True}, False),
    ],
)
def test_small_models_have_one_tensor_rank_unless_memory_forces_more(
    name: str, gigabytes: float, only: Mapping[str, Any], has_one: bool
) -> None:
    """And the first choice is what docs/scaling.md says."""
    file = f"{name}.yaml"
    config, _ = parse(["--config", str(ROOT / "configs" / file), "--data.kind", "synthetic", "--data.path", "null"])
    cluster = replace(H100, memory=replace(H100.memory, gb=gigabytes))
    (first,) = Search(Space(config=config, ranks=64, only=only), Evaluator(config, cluster, 64)).best(1).best
    assert (first.layout.tensor == 1) == has_one
    assert first.mfu is not None
    if has_one:
        row = f"(`{file}`) | `{first.layout}` | {first.seconds:.4f} | {100 * first.mfu:.1f} % |"
        assert row in (ROOT / "docs" / "scaling.md").read_text()


def test_the_layouts_of_two_towers_are_those_that_both_can_be_split_into() -> None:
    config = parse(["--config", str(ROOT / "configs/digits_contrastive.yaml"), "--text.num_heads", "2"])[0]
    space = Space(config=config, ranks=16, only={})
    layers = (1 + 3 + 1) + (1 + 2 + 1) + 1
    assert space.num_layers == layers and (8, 2) in space.shapes(next(iter(space.families())))
    assert {key.tensor for key in space.families()} == {1, 2}, "the image tower alone has four heads"
    keys = ["--contrastive.momentum", "0.9", "--contrastive.queue", "8"]
    queued, _ = parse(["--config", str(ROOT / "configs/digits_simclr.yaml"), *keys])
    space = Space(config=queued, ranks=16, only={"pipeline": 1})
    assert {d for key in space.families() for _, d in space.shapes(key)} == {4, 8}, "sixteen would not have a key each"


def test_data_need_not_be_there_whatever_is_said_of_them(tmp_path: Path) -> None:
    """As the config.yaml of a run says it."""
    given = DataConfig(
        kind="webdataset", path="a::b", val_path="c", weights=(1.0, 2.0), shuffle_window=4, label_column="kind",
        max_bad_share=0.05, eval_transform="timm", crop_pct=0.9, mixup=0.8, index_dir="d",
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(replace(SMALL, data=given).to_yaml())
    config, _ = parse([*ANY_DATA, "--config", str(tmp_path / "config.yaml")], "tools.plan")
    assert config.data == DataConfig(kind="synthetic", mixup=0.8)


def test_images_of_several_sizes_are_planned_in_pairs() -> None:
    """And on no context ranks, as a run has them."""
    config = replace(SMALL, data=DataConfig(kind="synthetic", variable_resolution=0.5))
    space = Space(config=config, ranks=4, only={"pipeline": 1})
    layouts = every(space)
    assert {layout.micro_batch for layout in layouts} == {2, 4, 8} and {layout.context for layout in layouts} == {1}
    for layout in layouts:
        layout.configured(config).resolve(4)
    few = replace(config, train=replace(config.train, global_batch_size=4))
    assert {layout.data for layout in every(replace(space, config=few))} == {2}, "four would have an image each"
    only = {"pipeline": 1, "tensor": 1, "micro_batch": 2, "zero": 0}
    space, evaluator = Space(config=config, ranks=2, only=only), Evaluator(config, of_gigabytes(80.0), 2)
    assert [found.layout.data for found in Search(space, evaluator).best(5).best] == [2]


def test_of_a_joint_loss_all_micro_batches_are_planned() -> None:
    """Which holds what the last layer gives of each; and one of images may ask for triplets of them."""
    joint = DistillationConfig(teacher="none", relations=("angles",), relations_weight=1.0)
    config = replace(SMALL, objective="distillation", distillation=joint)
    layout, evaluator = Layout(micro_batch=1), Evaluator(config, H100.of_ranks(1), 1)
    assert evaluator._few(layout, config).train.global_batch_size == 16
    plain = Evaluator(SMALL, H100.of_ranks(1), 1)
    assert plain._few(layout, SMALL).train.global_batch_size < 16
    for images in (1, 2):
        assert plain._alone(Key(tensor=1, sequence=True, context=1), images)[1].train.global_batch_size >= 3


def test_two_towers_take_a_forward_more_where_there_are_several_micro_batches() -> None:
    config = parse(["--config", str(ROOT / "configs/digits_contrastive.yaml"), "--train.global_batch_size", "16"])[0]
    evaluator = Evaluator(config, of_gigabytes(80.0), 2)
    one, two = (evaluator.exactly(Layout(data=2, micro_batch=size)) for size in (8, 4))
    assert isinstance(one, Prediction) and isinstance(two, Prediction)
    for found, passes in ((one, 1), (two, 2)):
        assert make_objective(found.config).passes == passes
        assert make_objective(run_config(found, config).resolve(2)).passes == passes
        assert not is_open(run_config(found, config).resolve(2)), "the run has what was planned"
        run = predict_step(found.config, GridShape(data=2), of_gigabytes(80.0))
        assert found.seconds == pytest.approx(run.seconds)
    many = evaluator.exactly(Layout(data=2, micro_batch=1))
    assert isinstance(many, Prediction)
    assert many.peaks == peaks(many.config, GridShape(data=2), 80e9), "the loss holds embeddings of all micro-batches"
    assert two.seconds > 2 * 1.2 * one.seconds, "launches of kernels: twice as many micro-batches, and a forward each"
