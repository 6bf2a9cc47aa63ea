"""The command line and YAML files: what wins, what is printed, and one clean line for each mistake."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml

import pretrain_vit
from engine.config import Config
from engine.config.cli import make_parser, parse
from engine.config.keys import key_types, nearest, wanted
from engine.errors import ConfigError
from model import StageConfig, VisionTransformer
from parallel.process_group import World
from tests.engine.small import flags, small

A_PAIR = "it must be an integer, a list of 2 integers or null"
A_PATTERN = "it must be a text, a list of texts or null"


def message(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, text: str) -> str:
    file = folder / "given.yaml"
    file.write_text(text)
    return str(file)


def test_nothing_given_is_the_default() -> None:
    assert parse([]) == (Config(), False)


def test_flags_are_keys() -> None:
    assert parse(flags()) == (small(), False)
    config, _ = parse(["--optimizer.betas", "[0.8, 0.9]", "--model.qk_norm=true", "--optimizer.lr", "1e-5"])
    assert config.optimizer.betas == (0.8, 0.9) and config.model.qk_norm is True and config.optimizer.lr == 1e-5


@pytest.mark.parametrize("flag_first", [False, True])
def test_flags_win_over_files_and_later_files_over_earlier(tmp_path: Path, flag_first: bool) -> None:
    (tmp_path / "first.yaml").write_text("train: {steps: 1, seed: 1, max_bad_steps: 1}\nmodel: {width: 8}\n")
    (tmp_path / "second.yaml").write_text("train: {steps: 2, seed: 2}\n")
    files = [f"--config={tmp_path / 'first.yaml'}", "--config", str(tmp_path / "second.yaml")]
    flag = ["--train.steps", "3"]
    config, _ = parse(flag + files if flag_first else files + flag)
    assert (config.train.steps, config.train.seed, config.train.max_bad_steps, config.model.width) == (3, 2, 1, 8)


@pytest.mark.parametrize(
    ("files", "argv", "steps", "epochs"),
    [
        (["train: {steps: 5}"], ["--train.epochs", "2"], None, 2),
        (["train: {epochs: 2}"], ["--train.steps=5"], 5, None),
        (["train.epochs: 2"], ["--train", "{steps: 5}"], 5, None),
        (["train: {steps: 5}", "train: {epochs: 2}"], [], None, 2),
        (["train: {epochs: 2}", "train.steps: 5"], [], 5, None),
        (["train: {steps: 5}", "train: {epochs: 2}"], ["--train.steps", "7"], 7, None),
        (["train: {steps: 5}"], ["--train.epochs", "null"], 5, None),
        (["train: {steps: 5, epochs: null}"], ["--train.seed", "3"], 5, None),
        (["train: {steps: 5}"], ["--train.steps", "null", "--train.epochs", "2"], None, 2),
        (["train: {steps: 5, epochs: 2}"], [], 5, 2),  # refused when it is resolved
        (["train: {steps: 5}"], ["--train.steps", "6", "--train.epochs", "2"], 6, 2),
    ],
)
def test_epochs_displace_steps_of_an_earlier_source(
    tmp_path: Path, files: list[str], argv: list[str], steps: int | None, epochs: float | None
) -> None:
    for i, text in enumerate(files):
        (tmp_path / f"{i}.yaml").write_text(text)
        argv = [*argv, "--config", str(tmp_path / f"{i}.yaml")]
    train = parse(argv)[0].train
    assert (train.steps, train.epochs) == (steps, epochs)


@pytest.mark.parametrize("text", ["", "train:\n", "train:\n\nmodel: null\n", "# nothing\n"])
def test_groups_without_keys_are_absent(tmp_path: Path, text: str) -> None:
    assert parse(["--config", write(tmp_path, text)])[0] == Config()


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    config, _ = parse(["--config", write(tmp_path, "optimizer: {lr: 1e-3, eps: 1E-8}\nrun_dir: 2024-01-01\n")])
    assert (config.optimizer.lr, config.optimizer.eps, config.run_dir) == (1e-3, 1e-8, "2024-01-01")


def test_the_shipped_recipes_are_valid(tmp_path: Path) -> None:
    recipes = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
    assert recipes
    for images, name in (("digits", "digits.yaml"), ("textures", "textures_teacher.yaml")):
        teacher, _ = parse(["--config", str(recipes[0].with_name(name))])
        VisionTransformer(teacher.model).save_pretrained(tmp_path / images)
    for recipe in recipes:
        given, images = recipe.read_text(), recipe.stem.partition("_")[0]
        teaches = ["--distillation.teacher", str(tmp_path / images)]
        folder = ["--data.path", "photos"] if "image_folder" in given else []
        config, _ = parse(["--config", str(recipe), *folder, *(teaches if "objective: distillation" in given else [])])
        p = config.parallel
        config.resolve(p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size)
        is_large = (
            recipe.name.startswith("vit_") and recipe.name != "vit_ti16.yaml"
        )  # a GPU's: fp32 is ten times slower
        assert config.precision.dtype == ("bf16" if is_large else "fp32"), recipe.name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", "full"),
        ("'[window, full] * 2'", "[window, full] * 2"),
        ("window * 3, full", "window * 3, full"),
        ("[window, full]", ("window", "full")),
        ("[window * 3, full]", ("window * 3", "full")),
        ("['[window, full] * 2', linear]", ("[window, full] * 2", "linear")),
        ("null", None),
    ],
)
def test_kinds_of_attention_as_a_text_or_a_list(tmp_path: Path, text: str, expected: object) -> None:
    flag = text.strip("'")
    for argv in (["--config", "given.yaml"], ["--model.attention", flag], [f"--model.attention={flag}"]):
        file = write(tmp_path, f"model:\n  attention: {text}\n")
        config, _ = parse([file if part == "given.yaml" else part for part in argv])
        assert config.model.attention == expected
        assert parse(["--config", write(tmp_path, config.to_yaml())])[0] == config


@pytest.mark.parametrize(("text", "expected"), [("96", 96), ("[96, 128]", (96, 128)), ("[96,128]", (96, 128))])
def test_the_size_of_an_image_as_a_number_or_a_pair(tmp_path: Path, text: str, expected: object) -> None:
    for argv in (["--config", write(tmp_path, f"model:\n  image_size: {text}\n")], ["--model.image_size", text]):
        config, _ = parse(argv)
        assert config.model.image_size == expected
        assert parse(["--config", write(tmp_path, config.to_yaml())])[0] == config


@pytest.mark.parametrize("text", ["48,96", "48, 96", "[48,96]"])
def test_a_flag_takes_numbers_without_brackets(text: str) -> None:
    for argv in (["--model.image_size", text], [f"--model.image_size={text}"]):
        assert parse(argv)[0].model.image_size == (48, 96)
    assert parse(["--optimizer.betas", "0.8,9e-1"])[0].optimizer.betas == (0.8, 0.9)
    assert parse(["--run_dir", "1,2"])[0].run_dir == "1,2"  # a text
    with pytest.raises(ConfigError, match=r"^model\.image_size is .*: it must be an integer, a list of 2 integers"):
        parse(["--model.image_size", "48,96,3"])


PYRAMID = """
model:
  stages:
    - {depth: 2, width: 16, num_heads: 4}
    - depth: 1
      width: 32
      num_heads: 4
      mlp_dim: 48
      attention: '[window, full] * 1'
      window_size: 3
      grid_size: null
    - {depth: 2, width: 32, num_heads: 4, attention: [window, full]}
"""
STAGES = (
    StageConfig(depth=2, width=16, num_heads=4),
    StageConfig(depth=1, width=32, num_heads=4, mlp_dim=48, attention="[window, full] * 1", window_size=3),
    StageConfig(depth=2, width=32, num_heads=4, attention=("window", "full")),
)


def test_stages_as_a_list_of_groups(tmp_path: Path) -> None:
    file = write(tmp_path, PYRAMID)
    config, _ = parse(["--config", file])
    assert config.model.stages == STAGES
    assert parse(["--config", write(tmp_path, config.to_yaml())])[0] == config
    flag = "[{depth: 3, width: 8, num_heads: 2}]"
    one = (StageConfig(depth=3, width=8, num_heads=2),)
    file = write(tmp_path, PYRAMID)
    for argv in (["--model.stages", flag], [f"--model.stages={flag}"], ["--model.stages", flag, "--config", file]):
        assert parse(argv)[0].model.stages == one  # a list replaces another whole
    assert parse(["--config", file, "--model.stages", "null"])[0].model.stages is None
    (tmp_path / "other.yaml").write_text(f"model: {{stages: {flag}}}\n")
    assert parse(["--config", file, "--config", str(tmp_path / "other.yaml")])[0].model.stages == one
    assert parse(["--config", str(tmp_path / "other.yaml"), "--config", file])[0].model.stages == STAGES


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("3", "model.stages is 3: it must be a list of groups of keys or null"),
        ("many", "model.stages is 'many': it must be a list of groups of keys or null"),
        ("{depth: 1}", "model.stages is {'depth': 1}: it must be a list of groups of keys or null"),
        ("[3]", "model.stages[0] is 3: it must be a group of keys, of depth, width, num_heads, mlp_dim, attention, "),
        ("[{depth: 1, width: 8, num_heads: 2}, null]", "model.stages[1] is null: it must be a group of keys, of "),
        ("[{depth: 1, width: 8}]", "model.stages[0].num_heads is not set: it must be an integer"),
        ("[{}]", "model.stages[0].depth is not set: it must be an integer"),
        ("[{dpeth: 1}]", "unknown key model.stages[0].dpeth: did you mean model.stages[0].depth?"),
        ("[{zzz: 1}]", "unknown key model.stages[0].zzz: choose among depth, width, num_heads, mlp_dim, attention, "),
        ("[{class_path: os.system}]", "unknown key model.stages[0].class_path: choose among depth, width, num_heads, "),
        ("[{depth: x, width: 8, num_heads: 2}]", "model.stages[0].depth is 'x': it must be an integer"),
        ("[{depth: 1.5}]", "model.stages[0].depth is 1.5: it must be an integer"),
        ("[{depth: '1'}]", "model.stages[0].depth is '1': it must be an integer"),
        ("[{depth: true}]", "model.stages[0].depth is true: it must be an integer"),
        ("[{depth: null}]", "model.stages[0].depth is null: it must be an integer"),
        ("[{mlp_dim: [1]}]", "model.stages[0].mlp_dim is [1]: it must be an integer or null"),
        ("[{attention: 3}]", f"model.stages[0].attention is 3: {A_PATTERN}"),
        ("[{attention: [full, 3]}]", f"model.stages[0].attention is ['full', 3]: {A_PATTERN}"),
        ("[{depth: 1, depth: 2}]", "key model.stages[0].depth is given twice: merge them into one"),
    ],
)
def test_a_mistake_in_a_stage_says_where(tmp_path: Path, given: str, expected: str) -> None:
    file = write(tmp_path, f"model:\n  stages: {given}\n")
    assert message("--config", file).startswith(f"{file}: {expected}")
    if "given twice" not in expected:
        assert message("--model.stages", given) == message(f"--model.stages={given}")
        assert message("--model.stages", given).startswith(expected)


def test_stages_are_not_a_group_of_their_own(tmp_path: Path) -> None:
    expected = "unknown key model.stages.depth: did you mean model.depth?"
    assert message("--model.stages.depth", "3") == message("--model.stages.depth=3") == expected
    for text in ("model: {stages.depth: 3}\n", "model.stages.depth: 3\n"):
        file = write(tmp_path, text)
        assert message("--config", file) == f"{file}: {expected}"
    assert message("--model.stages") == "--model.stages has no value: it must be a list of groups of keys or null"
    assert message("--model.stages", "--model.width", "3").startswith("--model.stages has no value: ")
    assert message("--model.stages", "[{").startswith("model.stages is not valid YAML: did not find expected node")


UNKNOWN = [
    ("--train.stesp", "train.stesp: did you mean train.steps?"),
    ("--trian.steps", "trian.steps: did you mean train.steps?"),
    ("--runs_dir", "runs_dir: did you mean run_dir?"),
    ("--confg", "confg: did you mean config?"),
    ("--steps", "steps: did you mean train.steps?"),
    ("--train.lr", "train.lr: did you mean optimizer.lr?"),
    ("--tensor_parallel_size", "tensor_parallel_size: did you mean parallel.tensor_parallel_size?"),
    ("--train.global-batch-size", "train.global-batch-size: did you mean train.global_batch_size?"),
    ("--train.step", "train.step: did you mean train.steps?"),  # no abbreviations: a new key must not break scripts
    ("--zzz", "zzz: --help lists all keys"),
]


@pytest.mark.parametrize(("flag", "expected"), UNKNOWN)
def test_an_unknown_flag_names_the_nearest(flag: str, expected: str) -> None:
    assert message(flag, "3") == message(f"{flag}=3") == f"unknown key {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  stesp: 3\n", "unknown key train.stesp: did you mean train.steps?"),
        ("model: {preset: vit_b16, wdith: 3}\n", "unknown key model.wdith: did you mean model.width?"),
        ("trian:\n  steps: 3\n", "unknown key trian: did you mean train?"),
        ("runs_dir: x\n", "unknown key runs_dir: did you mean run_dir?"),
        ("steps: 3\n", "unknown key steps: did you mean train.steps?"),
        ("zzz: 3\n", "unknown key zzz: --help lists all keys"),
        ("3: 4\n", "unknown key 3: --help lists all keys"),
        ("config: other.yaml\n", "config is an option of the command line, not a key of a file"),
        ("print_config: true\n", "print_config is an option of the command line, not a key of a file"),
        ("train: 3\n", "train is 3: it must be a group of keys, such as train.global_batch_size"),
        ("train: [1, 2]\n", "train is [1, 2]: it must be a group of keys, such as train.global_batch_size"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "key train is given twice: merge them into one"),
        ("train:\n  steps: 1\n  steps: 2\n", "key train.steps is given twice: merge them into one"),
        ("train:\n  steps: many\n", "train.steps is 'many': it must be an integer or null"),
        ("train:\n  steps: {}\n", "train.steps is {}: it must be an integer or null"),
        ("model: {width: 3.5}\n", "model.width is 3.5: it must be an integer or null"),
        ("data: {mean: [0.5, a]}\n", "data.mean holds 'a': it must be a list of numbers, such as [0.5]"),
        ("model: {image_size: [8, x]}\n", f"model.image_size holds 'x': {A_PAIR}"),
        ("model: {attention: 3}\n", f"model.attention is 3: {A_PATTERN}"),
        ("model: {attention: [3]}\n", f"model.attention holds 3: {A_PATTERN}"),
        ("model: {attention: [full, null]}\n", f"model.attention holds null: {A_PATTERN}"),
        ("model: {attention: true}\n", f"model.attention is true: {A_PATTERN}"),
        ("model: {attention: {full: 3}}\n", f"model.attention is {{'full': 3}}: {A_PATTERN}"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path, text)
    assert message("--config", file) == f"{file}: {expected}"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--model.width abc", "model.width is 'abc': it must be an integer or null"),
        ("--train.seed 1.5", "train.seed is 1.5: it must be an integer"),
        ("--train.seed null", "train.seed is null: it must be an integer"),
        ("--model.width None", "model.width is 'None': it must be an integer or null"),
        ("--optimizer.lr fast", "optimizer.lr is 'fast': it must be a number"),
        ("--data.flip maybe", "data.flip is 'maybe': it must be true or false"),
        ("--model.qk_norm 2", "model.qk_norm is 2: it must be true, false or null"),
        ("--model.block serial", "model.block is 'serial': it must be parallel, sequential or null"),
        ("--device tpu", "device is 'tpu': it must be auto, cpu or cuda"),
        ("--precision.dtype fp12", "precision.dtype is 'fp12': it must be"),
        ("--model.image_size big", f"model.image_size is 'big': {A_PAIR}"),
        ("--model.image_size 1.5", f"model.image_size is 1.5: {A_PAIR}"),
        ("--model.image_size true", f"model.image_size is true: {A_PAIR}"),
        ("--model.image_size [96]", f"model.image_size is [96]: {A_PAIR}"),
        ("--model.image_size [1,2,3]", f"model.image_size is [1, 2, 3]: {A_PAIR}"),
        ("--model.image_size [1.5,2]", f"model.image_size holds 1.5: {A_PAIR}"),
        ("--model.image_size 96x128", f"model.image_size is '96x128': {A_PAIR}"),
        ("--model.window_size wide", "model.window_size is 'wide': it must be an integer or null"),
        ("--model.norm batch", "model.norm is 'batch': it must be layernorm, rmsnorm or null"),
        ("--parallel.context_parallel_size 1.5", "parallel.context_parallel_size is 1.5: it must be an integer"),
        ("--optimizer.betas 0.9", "optimizer.betas is 0.9: it must be a list of 2 numbers, such as [0.9, 0.999]"),
        ("--optimizer.betas [0.9,x]", "optimizer.betas holds 'x': it must be a list of 2 numbers, such as"),
        ("--optimizer.betas [1,2,3]", "optimizer.betas is [1, 2, 3]: it must be a list of 2 numbers, such as"),
        ("--train 3", "train is 3: it must be a group of keys, such as train.global_batch_size"),
        ("--train.seed", "--train.seed has no value: it must be an integer"),
        ("--train.steps", "--train.steps has no value: it must be an integer or null"),
        ("--config", "--config has no value: it must be a file"),
        ("--model.width 64 128", "unexpected argument 128: options are --key value, and --help lists all keys"),
        ("-x", "unexpected argument -x: options are --key value, and --help lists all keys"),
        ("--train.seed -1", "train.seed is -1: it must be 0 or more"),
    ],
)
def test_wrong_types_say_what_was_given_and_what_would_work(argv: str, expected: str) -> None:
    assert message(*argv.split()).startswith(expected)


def test_numbers_must_be_finite(tmp_path: Path) -> None:
    file = write(tmp_path, "optimizer: {lr: .inf}\n")
    assert message("--config", file) == "optimizer.lr is inf: it must be a finite number"


def test_texts_must_be_such_as_files_can_hold() -> None:
    assert message("--run_dir", "runs/caf\udce9").startswith("run_dir is 'runs/caf\\udce9': it must be text in UTF-8")
    assert parse(["--run_dir", "runs/café"])[0].run_dir == "runs/café"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert message("--config", missing) == f"--config {missing} cannot be read: No such file or directory"
    assert message("--config", str(tmp_path)) == f"--config {tmp_path} cannot be read: Is a directory"
    assert message("--config", "").startswith("--config is empty: ")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    assert message("--config", str(tmp_path / "image.png")) == f"--config {tmp_path / 'image.png'} is not a text file"
    for text, problem in (
        ("train: {steps: [1\n", "expected ',' or ']'"),
        ("train:\n\tsteps: 1\n", "found character '\\t' that cannot start any token, line 2, column 1"),
        ("train: !!python/object:os.system 3\n", "could not determine a constructor"),
    ):
        file = write(tmp_path, text)
        assert message("--config", file).startswith(f"--config {file} is not valid YAML: {problem}")
    for text in ("- 1\n", "hello\n", "3\n"):
        file = write(tmp_path, text)
        assert message("--config", file) == f"--config {file} holds no `key: value` lines"


LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
NESTED = "[" * 1000 + "]" * 1000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"model: {{attention: {NESTED}}}\n", "is nested more than 32 deep"),
        ("model: {attention: " + "[" * 1000, "is nested more than 32 deep"),
        ("model: " + "{model: " * 1000 + "1" + "}" * 1000, "is nested more than 32 deep"),
        ("model: &me\n  attention: *me\n", "holds *me within &me"),
        ("model: {attention: &me [full, *me]}\n", "holds *me within &me"),
        (LAUGHS, "stands for more than 100000 values"),
        ("# as long as it is\n" * 500_000, "is larger than 256 KiB"),
        (f"train: {{steps: {'9' * 5000}}}\n", "is not valid YAML: Exceeds the limit"),
        ("train: {? [1, 2] : 3}\n", "is not valid YAML: "),
        ("run_dir: 2024-13-45\n", None),
    ],
    ids=str,
)
def test_files_beyond_any_configuration_are_refused_at_once(tmp_path: Path, text: str, problem: str | None) -> None:
    file = write(tmp_path, text)
    if problem is None:
        assert parse(["--config", file])[0].run_dir == "2024-13-45"
        return
    start = time.process_time()
    assert message("--config", file).startswith(f"--config {file} {problem}")
    assert time.process_time() - start < 5


def test_flags_have_the_limits_of_files() -> None:
    for key in ("model.attention", "model.stages", "train", "train.steps", "zzz"):
        for argv in ([f"--{key}", NESTED], [f"--{key}={NESTED}"]):
            assert message(*argv).startswith(f"--{key} is nested more than 32 deep")
    assert "train.steps" in message("--train.steps", "9" * 5000)
    assert message("--optimizer.lr", "9" * 400)


def test_references_within_a_file_are_allowed(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {stages: [&one {depth: 1, width: 8, num_heads: 2}, *one]}\n")
    assert parse(["--config", file])[0].model.stages == (StageConfig(depth=1, width=8, num_heads=2),) * 2


def test_help_has_a_line_for_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    described = {action.dest: action.help for action in make_parser()._actions}
    for key in (*key_types(), "config", "print_config"):
        assert re.search(rf"^ +--{re.escape(key)}\b", shown, re.MULTILINE), key
        text = (described[key] or "").strip()
        assert len(text) > 10 and "\n\n" not in text, f"{key} has no line of help: document its field"


def test_every_key_has_its_type_in_words() -> None:
    for key in key_types():
        assert re.fullmatch(r"[\w ,\[\].-]+", wanted(key)) and "class" not in wanted(key), key
        assert nearest(key) == key


def test_print_config_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain_vit.main([*flags(), "--print_config"], World(size=2))
    shown = capsys.readouterr().out
    values = yaml.safe_load(shown)
    assert values["train"]["micro_batch_size"] is None and "micro_batch_size: null  # here 4\n" in shown
    assert values["model"]["mlp_dim"] == 64
    assert shown == small().resolve(2).to_yaml(small())
    pretrain_vit.main([*flags(), "--print_config"], World(rank=1, size=2))
    with pytest.raises(SystemExit):
        pretrain_vit.main(["--help"], World(rank=1, size=2))
    assert capsys.readouterr().out == ""  # rank 0 speaks for all
