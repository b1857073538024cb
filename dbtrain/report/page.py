"""The page as HTML: one file that needs no network and no script."""

import time
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
        settings=_settings(facts),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts.made)),
    )


def _settings(facts: Facts) -> list[tuple[str, str]]:
    """What the run is, in a few words."""
    config = facts.config
    return [
        ("method", config.method.replace("_", " ")),
        ("network", f"{config.model.arch}, {config.model.depth} layers in {config.blocks} block(s)"),
        ("data", config.data.source),
        ("batch", f"{config.training.batch_size:,} samples"),
        ("noise", config.noise_process if facts.density else "none"),
        ("seed", str(config.seed)),
    ]
