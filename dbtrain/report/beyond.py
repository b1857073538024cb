"""The sections that look beyond one training: inside the layers, and at other numbers of blocks."""

from dbtrain.evaluation.report import main_readout
from dbtrain.evaluation.sweep.sweep import lines
from dbtrain.models.registry import architecture
from dbtrain.report import plots
from dbtrain.report.facts import Facts, Setting
from dbtrain.report.parts import Missing, Section, Table


def sweep(facts: Facts) -> Section | Missing | None:
    """How concepts lie in the layers; None for a network that has no behaviour to compare with."""
    kind, found = architecture(facts.config.model.arch), facts.sweep
    if found is None:
        can = kind.classifies or kind.likelihood == "next_token"
        return Missing("How concepts lie in the layers", "dbtrain sweep RUN") if can else None
    told: list[str] = []
    lines(found, told.append)
    rows = tuple(
        (
            one.name, str(row.layer), f"{row.r:.3f}", f"{row.low:.2f} to {row.high:.2f}", f"{row.p:.4f}",
            f"{row.spearman:.3f}", _optional(row.order_r), _optional(row.order_p), _optional(row.probe),
        )
        for one in found.sets
        for row in one.layers
    )  # fmt: skip
    head = ("concepts", "layer", "r", "95 % interval", "p", "spearman", "r with order", "its p", "probe")
    words = "How far distances between concepts in each layer agree with those of the answers. A filled dot: "
    words += "the layer has the concepts' order, as the answers have, corrected for the number of layers. "
    words += " ".join(f"{line[:1].upper()}{line[1:]}." for line in told)
    return Section("sweep", "Inside the layers", words, plots.sweep(found), (Table("By layer", head, rows),))


def similarity(facts: Facts) -> Section | None:
    """CKA with other networks, where there were any."""
    pairs = facts.sweep.beside if facts.sweep else []
    if not pairs:
        return None
    head = ("layer", *(f"{pair.one} and {pair.two}" for pair in pairs))
    rows = tuple(
        (str(layer), *(f"{pair.cka[place]:.3f} ({pair.permuted[place]:.3f})" for pair in pairs))
        for place, layer in enumerate(pairs[0].layers)
    )
    words = "CKA of the states of the same layer on the same prompts: 1 is the same geometry. "
    words += "Dotted, the greatest of 19 with permuted labels: no more than that is alike but for the labels."
    return Section("similarity", "The same geometry?", words, plots.similarity(pairs), (Table("CKA", head, rows),))


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def ablation(facts: Facts) -> Section | Missing:
    """The same configuration with other numbers of blocks."""
    found = facts.itself.evaluation
    if not facts.ablation:
        return Missing("Other numbers of blocks", "dbtrain ablate CONFIG")
    name = facts.config.evaluation.readout
    factor = 100 if found is not None and found.row.percent else 1
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in facts.ablation:
        score = _of(row, name)
        series = row.ranges if row.partition == "even" else f"{row.ranges}, {row.partition}"
        lines.setdefault(series, []).append(
            (row.blocks, factor * (score["mean"] or 0.0), factor * (score["std"] or 0.0))
        )
    series_of = [(series, sorted(points)) for series, points in lines.items()]
    rows = tuple((s, str(blocks), f"{mean:.4g}", f"{std:.2g}") for s, p in series_of for blocks, mean, std in p)
    what = found.row.label if found is not None else "score"
    table = Table("Mean and deviation over the seeds", ("ranges", "blocks", f"test {what}", "deviation"), rows)
    seeds = len(facts.ablation[0].seeds)
    words = f"The same configuration with other numbers of blocks; {seeds} seed(s) each."
    return Section(
        "ablation", "Ablation", words, plots.quality_by_blocks(series_of, f"test {what}"), (table,), open=False
    )


def _of(row: Setting, readout: str) -> dict[str, float | None]:
    test = row.scores["test"]
    return test[main_readout(test, readout)]
