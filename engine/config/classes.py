"""Whether a teacher's classes are the data's, by their names, where both have names."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from engine.config.teachers import computed, found_of, named
from engine.config.tower_teachers import towers_at
from engine.errors import ConfigError
from engine.teacher_outputs.meta import is_outputs
from engine.teacher_outputs.shards import stored_at

if TYPE_CHECKING:
    from engine.config.config import Config


class ClassOrder(NamedTuple):
    """Attributes: places: for each of the student's classes, the teacher's; None: the same. note: what to say of it."""

    places: tuple[int, ...] | None = None
    note: str = ""

    @property
    def fingerprint(self) -> str:
        """Behind that of a teacher's weights, of whose classifier it makes another; empty: the same."""
        if self.places is None:
            return ""
        return f", classes in order {blake2b(repr(self.places).encode(), digest_size=4).hexdigest()}"


def class_orders(config: Config, names: Sequence[str] | None) -> dict[str, ClassOrder]:
    """Of each teacher whose layers are in the student's list, by what their names begin with.

    Args:
        names: of the data's classes, in the order of their labels; None: they have none.

    Raises:
        ConfigError: some names are in both, in other places, and not all of the data's are the teacher's.
    """
    if config.objective != "distillation":
        return {}
    classes, found = config.model.sizes.classes, {name: found_of(of) for name, of in computed(config).items()}
    return {
        name: class_order(str(of.path), of.labels, names, classes) if of.classifies(classes) else ClassOrder()
        for name, of in found.items()
    }


def fingerprints(config: Config, names: Sequence[str] | None) -> tuple[str, ...]:
    """Of each teacher, if there are any: of stored outputs, or of weights and the order of their classes. Arguments and
    errors as of `class_orders`."""
    if config.objective == "contrastive" and (path := config.contrastive.teacher) is not None:
        return (towers_at(path, config.contrastive.teacher_load_weights).fingerprint,)
    if config.objective != "distillation":
        return ()
    orders = class_orders(config, names)
    return tuple(
        stored_at(of.path).meta.fingerprint
        if is_outputs(of.path)
        else found_of(of).fingerprint + orders[name].fingerprint
        for name, of in named(config).items()
    )


def class_order(path: str, theirs: Sequence[str], ours: Sequence[str] | None, classes: int) -> ClassOrder:
    """Of one of `classes` classes. Arguments and errors as of `class_orders`."""
    if ours is None or not theirs or tuple(theirs[: len(ours)]) == tuple(ours):
        return ClassOrder()
    there = {name: place for place, name in enumerate(theirs)}
    if len(there) == len(theirs) and all(name in there for name in ours):
        first = [there[name] for name in ours]
        places = (*first, *sorted(set(range(classes)) - set(first)))
        return ClassOrder(places, f"the teacher {path} has the data's classes in another order: they go by their names")
    others = [(place, name) for place, name in enumerate(ours) if name not in theirs[place : place + 1]]
    apart = [(place, name) for place, name in others if name in there]
    if apart:
        place, name = apart[0]
        lacking = next(name for name in ours if name not in there) if len(there) == len(theirs) else None
        why = "names that several of its classes have" if lacking is None else f"no class {lacking}"
        raise ConfigError(
            f"class {place} of the data is {name}, which is class {there[name]} of the teacher {path}, and it has "
            f"{why}, so that classes cannot go by names: call the data's classes as the teacher does, or take another"
        )
    place, name = others[0]
    called = f"calls class {place} {theirs[place]}" if place < len(theirs) else f"has no name for class {place}"
    return ClassOrder(note=f"the teacher {path} {called}, the data {name}: taken to be the same")
