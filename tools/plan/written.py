"""What is written of the layouts that were found: rows, and the configuration that runs one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from data import DataConfig
from engine.config import Config
from engine.config.cli import parse
from engine.errors import ConfigError
from engine.passes import is_open
from tools.plan import words
from tools.plan.evaluate import Prediction

# Flags by which data need not be there, whatever files say of them.
ANY_DATA = ["--data.kind", "synthetic"]
ANY_DATA += [
    part
    for name, value in DataConfig.without_effect("synthetic").items()
    for part in (f"--data.{name}", value if isinstance(value, str) else json.dumps(value))
]


def show_json(found: Sequence[Prediction], file: str) -> None:
    """Write the rows, with all parts."""
    Path(file).write_text(json.dumps(words.as_json(found), indent=1) + "\n")


def write(best: Prediction, given: Sequence[str], file: Path, cluster: str) -> None:
    """The configuration that runs a layout: as given, with the layout and its save sets."""
    config = run_config(best, parse([*ANY_DATA, *given], "tools.plan")[0])
    head = f"# Planned for {math.prod(best.layout.grid)} ranks of {cluster}: {1e3 * best.seconds:,.1f} ms a step\n"
    try:
        data = parse(given, "tools.plan")[0].data
        text = replace(config, data=data).to_yaml()
    except ConfigError:  # its data are to be named yet
        keys = yaml.safe_load(config.to_yaml())
        del keys["data"]
        text = yaml.safe_dump(keys, sort_keys=False)
        head += "# Its data are to be named, by --data.path and so on, or by another --config before this one\n"
    file.write_text(head + text)


def run_config(best: Prediction, given: Config) -> Config:
    """As given, with the layout and save sets of a prediction."""
    config = best.layout.configured(given)
    recompute = replace(best.config.recompute, policy=words.pattern(best))
    parallel = replace(config.parallel, layers_per_stage=best.config.parallel.layers_per_stage)
    if is_open(best.config):  # a run would take one where its device has room, whatever the plan's budget
        config = replace(config, contrastive=replace(config.contrastive, passes=2))
    return replace(config, parallel=parallel, recompute=recompute)
