"""The page as HTML: one file that needs no network and no script."""

import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from dbtrain.errors import ConfigError
from dbtrain.report.facts import Facts
from dbtrain.report.sections import sections
from dbtrain.report.verdict import judge
from dbtrain.run.run import Run

TEMPLATE = "page.html.j2"
REPORT = "report.html"


def write_page(run: Run, facts: Facts, to: Path | None) -> str:
    """Write the report of a run into its directory, or into a file elsewhere; says where.

    Raises:
        ConfigError: the file elsewhere cannot be written.
        ShardError: the run's directory cannot be written.
    """
    content = page(facts).encode()
    if to is None:
        run.store.write(REPORT, content)
        return run.store.where(REPORT)
    try:
        to.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be written ({error.strerror}): choose another place") from error
    return str(to)


def page(facts: Facts) -> str:
    """The report of a run; whatever comes from the run's files is escaped."""
    shown, missing = sections(facts)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("dbtrain.report").joinpath(TEMPLATE).read_text("utf-8"))
    return template.render(
        facts=facts,
        verdict=judge(facts),
        sections=shown,
        missing=missing,
        about=_about(facts),
        settings=_settings(facts),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts.made)),
    )


ABOUT: Mapping[str, str] = {
    "diffusion_blocks": "cut into {blocks}, each of which learns alone on its own slice of the noise",
    "end_to_end": "trained as a whole",
}
"""How a network was trained, by the method; any other is called by its name."""


def _about(facts: Facts) -> str:
    """What was done, in a sentence."""
    config = facts.config
    lengths = sorted({status.row.steps for status in facts.statuses})
    steps = f"{lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "")
    how = ABOUT.get(config.method, f"trained by the method {config.method.replace('_', ' ')}")
    return (
        f"{config.model.arch} of {_counted(config.model.depth, 'layer')}, "
        f"{how.format(blocks=_counted(config.blocks, 'block'))}: {steps} steps of "
        f"{_counted(config.training.batch_size, 'sample')} of the data set {config.data.source}."
    )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _settings(facts: Facts) -> list[tuple[str, str]]:
    """The rest of what the run is, in a few words."""
    config = facts.config
    return [
        ("method", config.method.replace("_", " ")),
        ("noise", config.noise_process if facts.density else "none"),
        ("seed", str(config.seed)),
    ]
