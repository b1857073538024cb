"""Which keys there are, and which one somebody meant who wrote another."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from dbtrain.config.model import ModelConfig, model_section
from dbtrain.config.run import Config
from dbtrain.config.section import Section, sections_of

BLOCK = "NUMBER"
"""Stands for the number of a block in `training.blocks.NUMBER.lr`."""
DEEPEST = 4
"""Parts of a key at most, as in `training.blocks.0.lr`."""
SHOWN = 3
"""Keys that one hint names."""
NEAR = 0.65
"""Least similarity, by difflib, of a key that is taken for a misspelt one."""
SURE = 0.8
"""The same where there is more to be mistaken for: other sections, or several keys of one name."""

OTHER_WORDS = {
    "learning_rate": "training.optimizer.lr",
    "max_lr": "training.optimizer.lr",
    "wd": "training.optimizer.weight_decay",
    "warmup_steps": "training.optimizer.warmup",
    "grad_clip": "training.optimizer.clip",
    "max_steps": "training.steps",
    "epochs": "training.steps",
    "dtype": "training.precision",
    "ema_decay": "training.ema",
    "gradient_accumulation": "training.micro_batch",
    "save_every": "training.checkpoint_every",
    "width": "model.dim",
    "hidden_size": "model.dim",
    "layers": "model.depth",
    "num_layers": "model.depth",
    "num_heads": "model.heads",
    "patch_size": "model.patch",
    "dataset": "data.source",
    "output_dir": "out",
    "gpus": "cluster.gpus_per_worker",
    "cpus": "cluster.cpus_per_worker",
    "num_workers": "cluster.workers",
    "num_blocks": "blocks",
}
"""What other programs call a key of ours."""


def hint(place: tuple[Any, ...], written: str, value: Any) -> str:
    """What was probably meant by an unknown key, whole and with its sections, or which keys there are in its
    section.

    Args:
        place: sections and key, with the member of a union where there is one, as pydantic gives it.
        written: the same as a user writes it.
        value: its value; a mapping where it was taken for a section.
    """
    key, here = str(place[-1]), keys_beside(place)
    kinds = [union for name, union in _all_keys() if union and name == f"{place[0]}.{key}"]
    if kinds and len(place) > 2:
        chooser = "source" if place[0] == "data" else "arch"
        return (
            f"it is for {place[0]}.{chooser}={' or '.join(kinds)}, and this is {place[1]}, where these are known: "
            f"{', '.join(here)}"
        )
    section = written.removesuffix(key)
    beside = [f"{section}{name}" for name in difflib.get_close_matches(key, here, n=1, cutoff=NEAR)]
    inside = [_below(f"{written}.{rest}") for rest in _ends(value)]
    meant = list(dict.fromkeys(sum(inside, []))) or _elsewhere(place) or beside or _similar(key)
    if meant:
        return f"did you mean {' or '.join(meant[:SHOWN])}?"
    return f"known here: {', '.join(here)}"


def _ends(value: Any, depth: int = DEEPEST) -> list[str]:
    """Keys with dots that a value of several parts has; none of a plain one, and none of what is deeper than
    any section, since a mapping of YAML may hold itself."""
    if not isinstance(value, dict) or depth == 0:
        return []
    ends = {str(key): _ends(part, depth - 1) for key, part in value.items()}
    return [end for key, below in ends.items() for end in ([f"{key}.{rest}" for rest in below] or [key])]


def _below(written: str) -> list[str]:
    """Keys that were meant by one whose section is unknown: those that end nearly so, since sections may have
    been left out; else those of its last part's name."""
    names, parts = list(dict.fromkeys(name for name, _ in _all_keys())), written.count(".") + 1
    ends = {name: ".".join(name.split(".")[-parts:]) for name in names}
    near = difflib.get_close_matches(written, list(ends.values()), n=1, cutoff=SURE)
    last = written.rpartition(".")[2]
    return [name for name in names if ends[name] in near or (not near and name.rpartition(".")[2] == last)]


def _elsewhere(place: tuple[Any, ...]) -> list[str]:
    """Keys of other sections with this very name, those of the same section's parts first."""
    key = str(place[-1])
    of_key = [(name, union) for name, union in _all_keys() if name.rpartition(".")[2] == key]
    named = [name for name, union in of_key if union in (None, *place)]
    named = named or list(dict.fromkeys(name for name, _ in of_key if not name.startswith(f"{place[0]}.")))
    # where the run has the key, its exception for a block is not what was meant
    found = [name for name in named if BLOCK not in name or name.replace(f"blocks.{BLOCK}.", "") not in named]
    inside = [name for name in found if name.startswith(f"{place[0]}.") and len(place) > 1]
    word = [OTHER_WORDS[key]] if key in OTHER_WORDS else []
    return inside or word or found


def _similar(key: str) -> list[str]:
    """Keys of any section that are spelt nearly like this, or begin with it."""
    last = {name: name.rpartition(".")[2] for name, union in _all_keys() if union is None and BLOCK not in name}
    close = difflib.get_close_matches(key, list(dict.fromkeys(last.values())), n=SHOWN, cutoff=0.8)
    return [name for name, end in last.items() if end in close or (len(key) > 3 and end.startswith(f"{key}_"))]


def _all_keys(section: type[Section] = Config, before: str = "", union: str | None = None) -> Iterator[tuple[str, Any]]:
    """Every key as a user writes it, and the member of a union that it is of, such as `vit`."""
    for name, field in section.model_fields.items():
        members = sections_of(field.annotation)
        if not members:
            yield f"{before}{name}", union
        for member in members:
            inner = f"{before}{name}." + (f"{BLOCK}." if is_by_block(field.annotation) else "")
            yield from _all_keys(member, inner, tag_of(member) if len(members) > 1 else union)


def keys_beside(place: tuple[Any, ...]) -> list[str]:
    """Keys of the section in which an unknown key was found."""
    section: Any = Config
    for i, part in enumerate(place[:-1]):
        candidates = sections_of(section.model_fields[part].annotation) if part in section.model_fields else [section]
        # the location of an error inside a union also names the member, by its discriminator
        tag = place[i + 1] if i + 1 < len(place) - 1 else None
        section = _member(candidates, tag) if candidates else section
    return list(section.model_fields)


def _member(candidates: list[type[Section]], tag: Any) -> type[Section]:
    """The member of a union with this tag, such as a class of the user's among the architectures."""
    found = next((c for c in candidates if tag_of(c) == tag), None)
    if found is None and isinstance(tag, str) and issubclass(candidates[0], ModelConfig):
        return model_section(tag)
    return found or candidates[0]


def section_at(place: tuple[Any, ...]) -> list[type[Section]]:
    """The sections that may stand at a place; none where a plain value stands."""
    annotation: Any = Config
    for part in place:
        known = [s for s in sections_of(annotation) if part in s.model_fields]
        annotation = known[0].model_fields[part].annotation if known else annotation
    return sections_of(annotation)


def is_by_block(annotation: Any) -> bool:
    """Whether a type is a mapping from block numbers."""
    return int in get_args(annotation) or any(is_by_block(part) for part in get_args(annotation))


def tag_of(section: type[Section]) -> Any:
    """The value by which a member of a union is chosen: its `arch` or `source`; None where it has neither."""
    for key in ("arch", "source"):
        if key in section.model_fields:
            return section.model_fields[key].default
    return None
