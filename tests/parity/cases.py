"""The rungs of the numerics ladder: every layout of 1, 2, 4 and 8 ranks, and the small models that climb it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, Literal

from data import DataConfig
from engine.config import Config, OptimizerConfig, PrecisionConfig, RecomputeConfig, ScheduleConfig, TrainConfig
from engine.config.contrastive import ContrastiveConfig
from engine.config.distillation import DistillationConfig, TeacherConfig
from model import ModelConfig, StageConfig, TextConfig
from parallel.config import ParallelConfig
from tests.parity.covering import covering
from tests.parity.teachers import stored, teacher, towers, with_teachers, with_towers, write_outputs

STEPS = 10
GLOBAL_BATCH = 16

# 16 patches of 2 x 2 with a register or a class token: 17 tokens, which no tensor-parallel size divides. 8 heads for 8
# tensor-parallel ranks; 10 classes, which 4 and 8 ranks share unevenly; 5 layers, which no number of stages divides.
_SMALL = ModelConfig(
    image_size=8, patch_size=2, in_channels=1, num_classes=10, width=32, depth=3, num_heads=8, mlp_dim=64, drop_path=0.1
)
# Maps of 5 x 6 patches, which no window or grid here divides, and which a patch merge must fill up; images that do not
# fill their last patches; 5 heads, which no tensor-parallel size divides.
_FAMILY = ModelConfig(
    image_size=(9, 12), patch_size=2, in_channels=1, num_classes=10, width=32, depth=6, num_heads=8, mlp_dim=48,
    drop_path=0.1, window_size=3, grid_size=2, registers=1,
)  # fmt: skip
_EVERY_LAYER = 1e-3  # MiB: each layer is gathered and reduced by itself
_DEEP = 6  # blocks for 8 stages: with embedding and head one layer each
MODELS = {
    "parallel": replace(_SMALL, block="parallel", qk_norm=True, bias=False, gelu="tanh", pool="map", registers=1),
    "sequential": replace(_SMALL, block="sequential", bias=True, position="learned_1d", pool="cls"),
    "mixed": replace(_SMALL, block="parallel", bias=True, position="sincos_2d", pool="gap", registers=1),
    "kinds": replace(
        _FAMILY, block="sequential", attention="window, shifted_window, grid, linear, global_tokens, causal",
        global_tokens=2, position="rope_2d", norm="rmsnorm", mlp="swiglu", layer_scale=0.5, linear_conv=3, qk_norm=True,
        pool="gap", qkv_bias="qv",
    ),
    "pyramid": replace(
        _FAMILY, width=None, depth=None, num_heads=None, mlp_dim=None, block="parallel", pool="map", bias=False,
        position="learned_2d", attention="[shifted_window, grid] * 2, full, linear", mlp="swiglu", layer_scale=0.5,
        norm_eps=1e-4,
        stages=(
            StageConfig(depth=2, width=16, num_heads=4), StageConfig(depth=3, width=32, num_heads=4),
            StageConfig(depth=1, width=48, num_heads=4, mlp_dim=64),
        ),
    ),
    "heads": replace(
        _FAMILY, width=40, depth=3, num_heads=5, block="parallel", pool="cls", position="learned_1d", qk_norm=True,
        attention="linear, global_tokens, full", feature_map="focused", grid_size=None, registers=0,
        global_tokens=1, qkv_bias="qv", norm_bias=False, norm_eps=1e-3, qk_norm_over="width",
    ),
    # windows larger than the last map, and three heads
    "swin": replace(
        _FAMILY, width=None, depth=None, num_heads=None, mlp_dim=None, grid_size=None, window_size=4, pool="gap",
        attention="[window, shifted_window] * 2", relative_position=True, norm_eps=1e-5, qk_norm=True,
        qk_norm_bias=True, position="rope_2d",  # else a bias of keys changes nothing
        stages=(StageConfig(depth=2, width=24, num_heads=3), StageConfig(depth=2, width=48, num_heads=6)),
    ),
    "distilled": replace(
        _SMALL, block="sequential", position="learned_1d", pool="cls", class_tokens=2, class_position=False,
        registers=1, pre_norm=True, patch_bias=False, norm_after_pool=True, gelu="quick", classifier_bias=False,
    ),
    "beside": replace(
        _SMALL, block="parallel", position="none", pool="cls_gap", registers=1, pre_norm=True, norm="rmsnorm",
        norm_after_pool=True, gelu="quick",
    ),
}  # fmt: skip
# Images of several sizes in each micro-batch: 8 to 24 patches in training, as many as 16 on average.
PACKED = {
    "packed": replace(_SMALL, block="parallel", qk_norm=True, pool="map", registers=1),
    "packed_turned": replace(_SMALL, block="sequential", position="rope_2d", pool="cls_gap", pre_norm=True),
    "packed_line": replace(_SMALL, block="sequential", position="learned_1d", pool="cls"),
}
# Two towers: pairs of digits and captions, which are cut at 20 bytes. Nine layers, which no number of stages divides;
# an embedding that four tensor ranks share unevenly. Ten classes, so that most images have several true partners. And
# two views of each image.
_IMAGE = replace(
    _SMALL, num_classes=None, width=24, depth=2, num_heads=4, mlp_dim=48, block="sequential", pool="map", registers=1,
    position="learned_1d",
)  # fmt: skip
_TEXT = TextConfig(width=32, depth=2, num_heads=4, mlp_dim=48, context_length=20, drop_path=0.1)
PAIRS: dict[str, tuple[ModelConfig, TextConfig, ContrastiveConfig]] = {
    "pairs": (_IMAGE, _TEXT, ContrastiveConfig(embedding=18)),
    "pairs_sigmoid": (
        replace(_IMAGE, block="parallel", pool="gap", bias=False),
        replace(_TEXT, attention="full", pool="map", block="parallel", norm="rmsnorm"),
        ContrastiveConfig(embedding=18, loss="sigmoid", projection="mlp"),
    ),
    "pairs_supcon": (
        replace(_IMAGE, pool="cls", qk_norm=True), replace(_TEXT, attention="full", pool="mean", mlp="swiglu"),
        ContrastiveConfig(embedding=18, loss="supcon"),
    ),
    # with a scale that is at its bound from the first step on
    "pairs_images": (
        _IMAGE, replace(_TEXT, attention="full", pool="last", norm="rmsnorm"),
        ContrastiveConfig(embedding=18, loss="supcon", positives="image", temperature=0.01),
    ),
    # beside two towers of other depths, widths, kinds of blocks, pixels and another embedding
    "pairs_taught": (
        _IMAGE, _TEXT,
        ContrastiveConfig(
            embedding=18, affinity_weight=3.0, embeddings_weight=2.0, teacher=towers(
                replace(_IMAGE, image_size=10, width=40, depth=3, num_heads=5, mlp_dim=56, pool="cls"),
                replace(_TEXT, width=24, depth=1, drop_path=0.0, norm="rmsnorm", attention="full"), 22,
            ),
        ),
    ),
    "views": (
        replace(_IMAGE, pool="gap", block="parallel"), TextConfig(),
        ContrastiveConfig(embedding=18, pairs="views", projection="mlp"),
    ),
    "moco": (
        replace(_IMAGE, pool="cls"), TextConfig(),
        ContrastiveConfig(embedding=18, pairs="views", momentum=0.8, predictor=20),
    ),
    "moco_queue": (
        replace(_IMAGE, pool="cls"), TextConfig(),
        ContrastiveConfig(embedding=18, pairs="views", momentum=0.8, queue=70),
    ),
}  # fmt: skip
# A student and its teachers: of other depths, widths and heads, other kinds of blocks, more patches, other pixels; one
# whose outputs are stored, one of other classes.
_TEACHER = replace(
    _SMALL, width=40, depth=5, num_heads=5, mlp_dim=56, block="sequential", qk_norm=True, registers=2, pool="map",
)  # fmt: skip
_MANY_HEADS = replace(_TEACHER, width=64, num_heads=8, pool="cls")  # queries of few features, normalised, would amplify
_PYRAMID = replace(MODELS["pyramid"], image_size=(12, 16))
TAUGHT: dict[str, tuple[ModelConfig, tuple[TeacherConfig, ...], DistillationConfig]] = {
    "taught": (
        replace(
            _SMALL, block="parallel", pool="cls", width=None, depth=None, num_heads=None, mlp_dim=None,
            stages=(
                StageConfig(depth=2, width=32, num_heads=8, mlp_dim=64),
                StageConfig(depth=1, width=40, num_heads=5, mlp_dim=56, merge=False),
            ),
        ),
        (teacher(_TEACHER, mean=(0.3,), std=(0.6,)),),
        DistillationConfig(
            response_weight=3.0, label_weight=0.5, temperature=1.5, standardise=("logits",),
            relations=("distances:3", "angles"), relations_weight=2.0,
        ),
    ),
    "taught_by_two": (
        MODELS["pyramid"], (teacher(_TEACHER, weight=3.0), stored(teacher(_PYRAMID, image_size=(14, 16)))),
        DistillationConfig(
            label_weight=0.0, response="sigmoid", embeddings_weight=2.0, features_weight=2.0, pairs="even:2",
        ),
    ),
    # at depth: wider rows, and a student that is a part of its teacher, with larger patches; another map of patches, of
    # a pyramid; losses of all kinds
    "matched": (
        replace(_MANY_HEADS, image_size=12, patch_size=3, width=48, depth=3, mlp_dim=50), (teacher(_MANY_HEADS),),
        DistillationConfig(
            features_weight=2.0, pairs=((0, 1), (2, 3)), response="hard", relations_weight=5.0, embeddings_weight=0.5,
            relations=("gram", "queries:0.5", "keys", "values", "maps:2"), relation_heads=4, start_from="even",
        ),
    ),
    "matched_to_two": (
        replace(
            MODELS["pyramid"],  # and a projection for its head
            stages=(*(MODELS["pyramid"].stages or ()), StageConfig(depth=0, width=40, num_heads=5, merge=False)),
        ),
        (teacher(replace(_TEACHER, num_classes=7), weight=3.0), teacher(_PYRAMID, image_size=(14, 16))),
        DistillationConfig(
            label_weight=0.0, response_weight=0.0, features_weight=3.0, features="cosine", pairs="even:3",
            relations_weight=20.0, relations=("gram", "values"), relation_heads=2, embeddings_weight=1.5,
            standardise=("features", "embeddings"),
        ),
    ),
}  # fmt: skip
FAMILY = ("kinds", "pyramid", "heads")
REPEATS = defaultdict(lambda: 1, pairs_images=4)  # rows of an image, which lie on several ranks and micro-batches
FEW = defaultdict[str, int | None](lambda: None, taught=70)  # labels, of half of the images
# images that are mixed with each other, of targets that are soft, under either loss
_SOFT = {"mixup": 0.8, "cutmix": 1.0, "mix_probability": 0.9}
_CROPS = {"crop_min_area": 0.4, "local_crop_area": (0.1, 0.4)}  # multi-crop, of either loss
AUGMENTED: dict[str, dict[str, Any]] = defaultdict(
    dict, mixed=_SOFT, taught_by_two=_SOFT, views=_CROPS | {"local_crops": 3}, moco=_CROPS | {"local_crops": 2},
    beside=_SOFT | {"erase": 0.4, "rand_augment": "rand-m7-n1-p0.7-mstd0.5-inc1"},
)  # fmt: skip
SMOOTHING = defaultdict(float, mixed=0.05, beside=0.1, taught=0.1)
LOSSES = defaultdict(lambda: "softmax", mixed="sigmoid")
KERNELS = defaultdict(lambda: "auto", sequential="reference", heads="reference")


@dataclass(frozen=True)
class Case:
    """One layout of one model."""

    model: str
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    data: int = 1
    context: int = 1
    schedule: str = "1f1b"
    micro_batches: int = 1
    depth: int | None = None  # blocks; None: the model's own
    zero: int = 0
    gather: float | None = None  # parallel.gather_memory at ZeRO stage 3; None: two buffers for all weights
    reduce: str = "auto"
    gradients: str = "fp32"  # parallel.gradient_dtype
    optimizer: str = "adamw"
    precision: str = "fp32"
    ema: float | None = None
    freeze: tuple[str, ...] = ()
    virtual: int | None = None  # parallel.virtual_stages
    policy: str = "static"
    recompute: str = "none"  # recompute.policy
    cut: tuple[int, ...] | None = None  # parallel.layers_per_stage
    batch: int = GLOBAL_BATCH
    shared_memory: bool = True  # False: gloo
    passes: Literal["auto", 1, 2] = "auto"  # contrastive.passes

    def __str__(self) -> str:
        sp = "sp" if self.sequence_parallel else ""
        cp = (f"-c{self.context}" if self.context > 1 else "") + (f"-z{self.zero}" if self.zero else "")
        cp += "-reduced-each" if self.reduce == "micro_batch" else ""
        how = "".join(
            f"-{value}" for value, usual in ((self.optimizer, "adamw"), (self.precision, "fp32")) if value != usual
        )
        how += f"-gather{self.gather}" if self.gather else ""
        how += ("-narrow" if self.gradients == "weights" else "") + (f"-ema{self.ema}" if self.ema else "")
        how += f"-{self.recompute}" if self.recompute != "none" else ""
        how += f"-frozen[{','.join(self.freeze)}]" if self.freeze else ""
        schedule = f"{Path(self.schedule).stem}{self.virtual or ''}{'ready' if self.policy == 'ready' else ''}"
        layout = f"t{self.tensor}{sp}-p{self.pipeline}{schedule}-d{self.data}{cp}-m{self.micro_batches}"
        layout += "" if self.shared_memory else "-gloo"
        layout += f"-cut{''.join(map(str, self.cut))}" if self.cut else ""
        layout += f"-b{self.batch}" if self.batch != GLOBAL_BATCH else ""
        layout += f"-passes{self.passes}" if self.passes != "auto" else ""
        return f"{self.model}-{layout}{how}"

    @property
    def ranks(self) -> int:
        """World size."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def one_process(self) -> Case:
        """What its numbers are held against."""
        return Case(
            self.model, depth=self.depth, optimizer=self.optimizer, precision=self.precision, ema=self.ema,
            freeze=self.freeze, batch=self.batch,
        )  # fmt: skip

    @property
    def blocks(self) -> int:
        """Of all towers."""
        if self.model in PAIRS:
            image, text, _ = PAIRS[self.model]
            return (image.depth or 0) + (text.depth or 0)
        if self.model in TAUGHT:
            return TAUGHT[self.model][0].resolve().sizes.depth
        return self.depth or (MODELS | PACKED)[self.model].resolve().sizes.depth

    @property
    def groups(self) -> dict[str, Any]:
        """Of the configuration: those that say what is trained."""
        if self.model in PAIRS:
            image, text, contrastive = PAIRS[self.model]
            own = with_towers(replace(contrastive, passes=self.passes))
            return {"model": image, "text": text, "contrastive": own, "objective": "contrastive"}
        if self.model in TAUGHT:
            student, teachers, keys = TAUGHT[self.model]
            return {"model": student, "distillation": with_teachers(keys, teachers), "objective": "distillation"}
        model = (MODELS | PACKED)[self.model]
        return {"model": model if self.depth is None else replace(model, depth=self.depth)}

    @property
    def by_1f1b(self) -> Case:
        """The same layout under the schedule that others are held against."""
        return replace(self, schedule="1f1b", virtual=None, policy="static")

    def config(self, **train: Any) -> Config:
        """The resolved configuration of the case; keyword arguments override the `train` group."""
        config = Config(
            **self.groups,
            data=DataConfig(
                rotate=10.0,
                shift=0.1,
                repeats=REPEATS[self.model],
                labels_per_class=FEW[self.model],
                **AUGMENTED[self.model],
                variable_resolution=0.5 if self.model in PACKED else 0.0,
                share_decoding="always" if self.micro_batches > 1 else "never",
            ),
            parallel=ParallelConfig(
                tensor_parallel_size=self.tensor,
                sequence_parallel=self.sequence_parallel,
                pipeline_parallel_size=self.pipeline,
                context_parallel_size=self.context,
                schedule=self.schedule,
                virtual_stages=self.virtual,
                layers_per_stage=self.cut,
                schedule_policy=self.policy,  # type: ignore[arg-type]
                zero_stage=self.zero,  # type: ignore[arg-type]
                reduce_gradients=self.reduce,  # type: ignore[arg-type]
                gradient_dtype=self.gradients,  # type: ignore[arg-type]
                reshard_after_forward="always" if self.zero == 3 and self.gather is None else "auto",
                gather_memory=self.gather if self.zero == 3 else None,
                bucket_mib=_EVERY_LAYER,
                shared_memory=self.shared_memory,
            ),
            train=TrainConfig(
                global_batch_size=self.batch,
                micro_batch_size=self.batch // self.data // self.micro_batches,
                steps=STEPS,
                loss=LOSSES[self.model],  # type: ignore[arg-type]
                label_smoothing=SMOOTHING[self.model],
                freeze=self.freeze,
                **train,
            ),
            # eps: where a gradient is zero but for rounding (the key bias under a softmax), Adam with a tiny eps would
            # blow the rounding up into a full step in a random direction; see docs/numerics.md.
            optimizer=OptimizerConfig(
                name=self.optimizer,  # type: ignore[arg-type]
                lr=1e-3,
                eps=1e-8 if self.optimizer == "adafactor" else 1e-5,
                weight_decay=0.1,
                head_weight_decay=0.3,
                clip_grad=1.0,
                ema_decay=self.ema,
            ),
            schedule=ScheduleConfig(name="cosine", warmup_steps=3),
            precision=PrecisionConfig(
                dtype=self.precision,  # type: ignore[arg-type]
                # gradients of few pairs are large, and in another layout other sums of them overflow
                initial_loss_scale=2.0 ** (10 if self.model in PAIRS and self.precision == "fp16" else 16),
            ),
            recompute=RecomputeConfig(policy=self.recompute),
            kernels=KERNELS[self.model],  # type: ignore[arg-type]
        )
        write_outputs(config, STEPS * GLOBAL_BATCH)
        return config.resolve(self.ranks)


_SETS = (
    "input", "norm+gather", "qkv+offload", "all", "qk_norm-attention", "attention+gather", "norm", "all+offload", "fc1",
    "input+gather", "input+gather+offload",
)  # fmt: skip


def recomputing(cases: Iterable[Case], every: int = 1) -> Iterator[Case]:
    """The same, each with another of the policies of `recompute` than the one before it: none, full, selective, and
    lists in which all kinds of save sets come to stand at all places.

    Args:
        every: of so many cases one; the others keep all.
    """
    sets, named = cycle(_SETS), cycle(("full", None, "selective", None, "none"))
    for number, case in enumerate(cases):
        if number % every:
            yield case
            continue
        policy = next(named) or ", ".join([*islice(sets, case.blocks + 1)][1:])
        yield replace(case, recompute=policy)


def cases(ranks: int) -> list[Case]:
    """Every grid of this many ranks, with all pairs of an isotropic model (the mixed one on at most two ranks),
    sequence parallelism, numbers of micro-batches and schedules, those of
    _FAMILY_LAYOUTS for the attention kinds, pyramids and uneven heads, several stages per rank, frozen parts, and
    other embeddings and heads, two towers; some with one of the policies of recomputation.
    """
    several = (_STAGES, _FROZEN, _OUTER, _PACKED, _PAIRS, _TAUGHT)
    isotropic = covering(all_isotropic(ranks), settings)
    plain = [*isotropic, *_family(ranks), *(case for known in several for case in known.get(ranks, ()))]
    return list(recomputing(plain, every=3))  # bits are compared elsewhere


# Several stages on a rank, which may hold the first and the last; backwards in two parts; by readiness; numbers of
# micro-batches that no number of ranks divides; a schedule from a file, with stages of a rank out of turn.
_TWELVE = {"batch": 12, "micro_batches": 6}
BY_HAND = str(Path(__file__).with_name("by_hand.csv"))
_STAGES = {
    2: [
        Case("parallel", pipeline=2, micro_batches=4, schedule="interleaved", policy="ready"),
        Case("sequential", pipeline=2, micro_batches=2, schedule="zb_v"),
        Case("pyramid", pipeline=2, batch=12, micro_batches=3, schedule=BY_HAND),
        Case("kinds", pipeline=2, batch=12, micro_batches=3, schedule="interleaved", virtual=3),
    ],
    4: [
        Case("parallel", pipeline=2, data=2, micro_batches=4, schedule="zb_v", zero=3),
        Case("kinds", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4, schedule="v_half", policy="ready"),
        Case("parallel", pipeline=2, context=2, micro_batches=2, schedule="zb_h2", zero=1),
        Case("pyramid", pipeline=4, schedule="interleaved", policy="ready", **_TWELVE),
        Case("pyramid", pipeline=4, schedule="zb_v", **_TWELVE),
        Case("parallel", pipeline=4, schedule="zb_h1", **_TWELVE),
    ],
    8: [Case("kinds", tensor=2, sequence_parallel=True, pipeline=4, micro_batches=4, schedule="zb_v", policy="ready")],
}  # fmt: skip


# the front, of which whole stages may be; the middle, through which gradients pass; kinds of parameters
FRONT, _MIDDLE, _PARTS = ("embed", "blocks.[01]"), ("blocks.[12]",), ("*.bias", "blocks.*.norm*", "head.fc.weight")
_FROZEN = {
    2: [
        Case("sequential", pipeline=2, micro_batches=2, freeze=FRONT),
        Case("parallel", pipeline=2, micro_batches=2, freeze=FRONT, schedule="v_half"),
        Case("parallel", tensor=2, sequence_parallel=True, freeze=FRONT, optimizer="muon"),
        Case("kinds", data=2, micro_batches=2, zero=3, freeze=_MIDDLE),
        Case("sequential", tensor=2, sequence_parallel=True, micro_batches=2, freeze=_PARTS, optimizer="lamb"),
    ],
    4: [
        Case("pyramid", pipeline=2, data=2, micro_batches=4, zero=2, freeze=(*FRONT, "merges.0", "blocks.2"),
             schedule="zb_h1"),
        Case("sequential", tensor=2, pipeline=2, micro_batches=4, freeze=_MIDDLE, schedule="zb_v"),
        Case("heads", data=2, context=2, micro_batches=2, zero=1, freeze=_PARTS, ema=0.9),
        Case("swin", data=2, context=2, micro_batches=2, zero=3, freeze=("*.relative_position",)),
        Case("parallel", pipeline=4, micro_batches=4, freeze=FRONT, schedule="zb_h2"),
    ],
}  # fmt: skip


# Two class tokens and no bias in embedding and head; class token and mean side by side, with micro-batches that part
# images from those that they are mixed with.
_OUTER = {
    2: [
        Case("distilled", tensor=2, sequence_parallel=True, micro_batches=2),
        Case("distilled", context=2, micro_batches=2, zero=2),
        Case("distilled", pipeline=2, micro_batches=2, freeze=("embed", "head.fc"), schedule="interleaved"),
        Case("beside", tensor=2, micro_batches=2),
        Case("beside", context=2, zero=1),
        Case("beside", data=2, batch=12, micro_batches=2, zero=3),
    ],
    4: [
        Case("distilled", tensor=2, pipeline=2, micro_batches=4),
        Case("beside", tensor=2, sequence_parallel=True, context=2, micro_batches=2, zero=1),
    ],
}


_PACKED = {
    1: [Case("packed", micro_batches=4)],
    2: [
        Case("packed", tensor=2, sequence_parallel=True, micro_batches=2),
        Case("packed", pipeline=2, micro_batches=4, schedule="zb_v"),
        Case("packed_turned", data=2, micro_batches=2, zero=3),
        Case("packed_turned", tensor=2, micro_batches=2),
        Case("packed_line", tensor=2, sequence_parallel=True, zero=1),
        Case("packed_line", pipeline=2, micro_batches=4, schedule="interleaved", policy="ready"),
    ],
    4: [
        Case("packed_turned", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4),
        Case("packed", pipeline=2, data=2, micro_batches=4, schedule="zb_h1", zero=2),
    ],
}


# The loss over all micro-batches and data ranks: in two passes, and in one where the schedule keeps all forwards.
_PAIRS = {
    1: [
        Case("pairs", micro_batches=4),
        Case("pairs", micro_batches=2, passes=1),
        Case("pairs_sigmoid", micro_batches=4),
        Case("pairs_images", batch=12, micro_batches=6),
        Case("pairs_taught", micro_batches=4),
        Case("views", micro_batches=4),
        Case("moco", micro_batches=4),
        Case("moco_queue", micro_batches=2),
    ],
    2: [
        Case("pairs", tensor=2, sequence_parallel=True, micro_batches=2),
        Case("pairs", pipeline=2, micro_batches=4),
        Case("pairs", data=2, micro_batches=2, zero=3),
        Case("pairs", context=2, micro_batches=2, zero=1),
        Case("pairs", pipeline=2, micro_batches=4, schedule="interleaved", policy="ready"),
        Case("pairs_sigmoid", data=2, passes=1, micro_batches=4),
        Case("pairs_sigmoid", pipeline=2, micro_batches=4, schedule="zb_v", freeze=("image",)),
        Case("pairs_images", data=2, batch=12, micro_batches=3, zero=2),
        Case("pairs_taught", data=2, micro_batches=2, zero=3),
        Case("pairs_taught", pipeline=2, micro_batches=4, schedule="interleaved", policy="ready"),
        Case("views", pipeline=2, micro_batches=4, schedule="v_half"),
        Case("moco", data=2, micro_batches=2, zero=3),
        Case("moco", tensor=2, micro_batches=2),
        Case("moco_queue", data=2, micro_batches=2),
    ],
    4: [
        Case("pairs", tensor=4, micro_batches=2),
        Case("pairs", pipeline=4, micro_batches=4, schedule="zb_h1", cut=(2, 3, 2, 2)),
        Case("pairs", pipeline=2, data=2, micro_batches=4, schedule="gpipe", zero=1),
        Case("pairs_sigmoid", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4, policy="ready"),
        Case("pairs_supcon", tensor=2, sequence_parallel=True, data=2, micro_batches=2, zero=3),
        Case("pairs_images", data=2, context=2, batch=12, micro_batches=3),
        Case("pairs_taught", tensor=2, sequence_parallel=True, context=2, micro_batches=2),
        Case("pairs_taught", pipeline=4, micro_batches=4, schedule="gpipe", cut=(4, 5, 5, 6)),
        Case("views", tensor=2, data=2, micro_batches=2, zero=1),
        Case("moco", pipeline=2, data=2, micro_batches=2, schedule="gpipe", zero=1),
        Case("moco_queue", pipeline=2, context=2, micro_batches=4),
    ],
}  # fmt: skip


# A teacher beside the student: split, shared out and cut as it is.
_TAUGHT = {
    1: [Case("taught", micro_batches=2), Case("taught_by_two", micro_batches=2), Case("matched", micro_batches=4)],
    2: [
        Case("taught", tensor=2, sequence_parallel=True, micro_batches=2),
        Case("taught", pipeline=2, micro_batches=4, schedule="interleaved", policy="ready"),
        Case("taught", data=2, micro_batches=2, zero=3),
        Case("taught", context=2, micro_batches=2, zero=2),
        Case("taught_by_two", pipeline=2, micro_batches=4, schedule="zb_v"),
        Case("taught_by_two", data=2, micro_batches=2, zero=1),
        Case("matched", tensor=2, sequence_parallel=True, micro_batches=2),
        Case("matched", context=2, micro_batches=2),
        Case("matched", pipeline=2, micro_batches=4, schedule="zb_v", policy="ready"),
        Case("matched_to_two", data=2, micro_batches=2, zero=3),
        Case("matched_to_two", tensor=2, micro_batches=2, freeze=("embed", "blocks.[01]")),
    ],
    4: [
        Case("taught", pipeline=2, data=2, micro_batches=4, schedule="v_half", zero=3),
        Case("taught", tensor=2, context=2, micro_batches=2),
        Case("taught_by_two", tensor=2, pipeline=2, micro_batches=4, schedule="zb_h1"),
        Case("taught", pipeline=4, micro_batches=4, schedule="gpipe", freeze=("embed", "blocks.0")),
        Case("matched", tensor=2, sequence_parallel=True, pipeline=2, micro_batches=4, schedule="interleaved"),
        Case("matched_to_two", pipeline=4, micro_batches=4, schedule="zb_h2"),
    ],
}  # fmt: skip


# (tensor, sequence parallel, pipeline, data, context) of the family: every axis alone, every pair, and all that share
# an image together. The pyramid's last map has two rows for context ranks; five heads serve five ranks.
_FAMILY_LAYOUTS = {
    1: [(1, False, 1, 1, 1)],
    2: [(2, True, 1, 1, 1), (2, False, 1, 1, 1), (1, False, 2, 1, 1), (1, False, 1, 2, 1), (1, False, 1, 1, 2)],
    4: [
        (2, True, 2, 1, 1), (2, False, 1, 2, 1), (2, True, 1, 1, 2), (2, False, 1, 1, 2), (1, False, 2, 1, 2),
        (1, False, 1, 2, 2), (4, True, 1, 1, 1), (1, False, 4, 1, 1), (1, False, 1, 1, 4),
    ],
    8: [(2, True, 2, 1, 2)],
}  # fmt: skip
_SWIN_LAYOUTS = {
    2: [(2, True, 1, 1, 1), (1, False, 2, 1, 1), (1, False, 1, 1, 2)],
    4: [(2, False, 1, 2, 1), (2, True, 1, 1, 2)],
}


def _family(ranks: int) -> Iterator[Case]:
    for model, layout in (*product(FAMILY, _FAMILY_LAYOUTS[ranks]), *product(("swin",), _SWIN_LAYOUTS.get(ranks, ()))):
        tensor, sequence_parallel, pipeline, data, context = layout
        if context <= 2 or model != "pyramid":
            yield Case(model, tensor, sequence_parallel, pipeline, data, context, micro_batches=max(pipeline, 2))


# Of the schedules, beside 1F1B, by ranks and by stages; those with several stages per rank where there are layers for
# them. With one micro-batch all of one stage per rank are the same.
_MOST = ("gpipe", "zb_h1", "zb_h2")
_OTHERS: dict[int, dict[int, tuple[str, ...]]] = {
    2: {2: _MOST},
    4: {2: _MOST, 4: _MOST},
    8: {2: ("interleaved", "v_half", "zb_h2"), 4: ("gpipe", "zb_h1"), 8: ("zb_h1",)},
}


def settings(case: Case) -> dict[str, Hashable]:
    """The factors of an isotropic case, for `covering`."""
    found: dict[str, Hashable] = {"grid": (case.tensor, case.pipeline, case.data)}
    found |= {"model": case.model, "several": case.micro_batches > 1}
    if case.tensor > 1:
        found["sequence parallel"] = case.sequence_parallel
    if case.pipeline > 1 and case.micro_batches > 1:
        found["schedule"] = case.schedule
    return found


def all_isotropic(ranks: int) -> Iterator[Case]:
    """On each grid all of models, sequence parallelism and numbers of micro-batches together. From four ranks on the
    models share the schedules, taking turns from grid to grid.
    """
    powers = [1, 2, 4, 8]
    others = {size: cycle(names) for size, names in _OTHERS.get(ranks, {}).items()}
    models = ("parallel", "sequential", "mixed") if ranks <= 2 else ("parallel", "sequential")
    turns = cycle((False, True))
    for tensor, pipeline, data in product(powers, powers, powers):
        if tensor * pipeline * data != ranks:
            continue
        several = min(4, GLOBAL_BATCH // data)
        options = product(models, (True, False) if tensor > 1 else (False,), (1, several))
        depth = _DEEP if pipeline == 8 else None
        turn = pipeline > 1 and next(turns)
        for model, sequence_parallel, micro_batches in options:
            second = model != models[0]
            case = Case(model, tensor, sequence_parallel, pipeline, data, 1, "1f1b", micro_batches, depth)
            if pipeline == 1 or micro_batches == 1:
                yield case
                continue
            if ranks <= 2 or second == turn:
                yield case
            if ranks <= 2 or second != turn:
                yield replace(case, schedule=next(others[pipeline]))
