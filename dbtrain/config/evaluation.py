"""Sections `evaluation` and `telemetry`: how a run is read out and observed."""

from typing import Annotated, Literal

from pydantic import Field

from dbtrain.config.section import Count, Section

AnySolver = Literal[
    "euler",
    "heun",
    "FlowMatchEulerDiscreteScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]
"""A solver of our own, or a scheduler of diffusers by the name of its class."""


Resident = Literal["auto", "all", "one", "pipeline"]
"""Which blocks of a merged model are in the memory of the device that computes;
or all, in processes of a cluster."""


class EvaluationConfig(Section):
    """How the merged model is read out."""

    steps_per_block: Count = 1
    readout: Literal["chain", "mean", "first"] = "mean"
    """`chain`: the last evaluation; `mean`: the mean of the chain's predictions; `first`: block 0 alone."""
    start: Literal["zero", "noise"] = "zero"
    """Where the chain starts: noise, as in the paper, or its mean, which makes a classifier deterministic."""
    batch_size: Count = 512
    precision: Literal["fp32", "bf16"] | None = None
    """Precision of the blocks' predictions; by default that of training on a GPU, and fp32 on a CPU."""
    compile: bool | None = None
    """Compile the blocks' layers; by default where training did, on a GPU, if at least 1,000 samples are
    drawn from noise: for less it takes longer than it saves."""
    resident: Resident = "auto"
    """Blocks in the memory of the GPU, or of the CPU: `all`; `one`, while the next one is read ahead; `auto`:
    all where they fit into 80 % of the memory that is free; `pipeline`: in processes of the cluster at
    `cluster.address`, such as one on each GPU, or of this machine."""
    stages: Count | None = None
    """The most processes of a pipeline; by default as many as the cluster has room for."""
    metric: str | None = None
    """An entry of evaluation/metrics.py; by default the first that fits what the architecture can do."""
    samples: Annotated[int, Field(ge=2)] = 10_000
    """Samples drawn for a distance between distributions."""
    steps: Count = 50
    """Noise levels of a drawn sample."""
    solver: AnySolver = "heun"
    """`heun` evaluates twice a step; for as many evaluations it gave the shipped DiT about half of `euler`'s
    distance (docs/quality.md). A scheduler of diffusers takes its steps between the same levels. `dbtrain
    sample` draws by it too."""
    spacing: Literal["karras", "slices"] = "karras"
    """Steps over the whole range, by EDM's schedule (of a flow equal ones before the shift), or as many in
    every slice."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 for none."""
    blend: bool = False
    """Near a boundary average both neighbours, where noise.overlap trained both."""
    controls: bool = True
    """Measure the controls too."""
    classifier: str | None = None
    """A classifier whose features compare images; by default one is trained for the data set, once."""
    inception: str | None = None
    """Inception weights (safetensors) for `metric: frechet_inception`."""
    judge: str | None = None
    """Folder of a causal language model of Hugging Face that `metric:
    generated` asks for the perplexity of texts."""
    mauve: bool = False
    """Also compare drawn and real texts by MAUVE (`metric:
    generated`): by the judge's features, else by n-grams."""
    texts: Count | None = None
    """The most samples of a split that are measured in bits, spread evenly over it; by default all."""


class TelemetryConfig(Section):
    """Where metrics go besides the JSONL events."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    project: str = "dbtrain"
