"""The configuration: typed, frozen, read from YAML with dotted overrides, unknown keys refused with a suggestion."""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dbtrain.errors import ConfigError

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
"""How an override begins: a dotted key and an equals sign."""


class Section(BaseModel):
    """Base of all sections: immutable, and no key but the declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class ViTConfig(Section):
    """Vision transformer that denoises the label's code."""

    noise_defaults: ClassVar[dict[str, Any]] = {}

    arch: Literal["vit"] = "vit"
    depth: Count = 6
    dim: Count = 64
    heads: Count = 4
    patch: Count = 2
    mlp_ratio: Positive = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class DiTConfig(Section):
    """Diffusion transformer that denoises an image or latent, given its class."""

    noise_defaults: ClassVar[dict[str, Any]] = {"ranges": "paper", "weighting": "edm"}
    """What `noise` is where the user says nothing: an L2 loss takes EDM's weight, and has no code to measure."""

    arch: Literal["dit"] = "dit"
    depth: Count = 6
    dim: Count = 64
    heads: Count = 4
    patch: Count = 2
    mlp_ratio: Positive = 4.0
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the labels hidden in training, for classifier-free guidance."""


class MaskedLMConfig(Section):
    """Masked diffusion language model."""

    noise_defaults: ClassVar[dict[str, Any]] = {"ranges": "alpha", "overlap": 0.0}
    """The ELBO splits exactly at the edges of the blocks."""

    arch: Literal["masked_lm"] = "masked_lm"
    depth: Count = 6
    dim: Count = 128
    heads: Count = 4
    mlp_ratio: Positive = 8 / 3
    level_dim: Count = 64
    """Width of the level's embedding."""


class RecurrentConfig(Section):
    """Recurrent-depth language model: its core is one denoiser, applied `evaluation.steps_per_block` times."""

    noise_defaults: ClassVar[dict[str, Any]] = {"input_scaling": "signal", "overlap": 0.0}

    arch: Literal["recurrent"] = "recurrent"
    depth: Count = 2
    """Layers of the core."""
    prelude: Annotated[int, Field(ge=0)] = 1
    coda: Annotated[int, Field(ge=0)] = 1
    dim: Count = 128
    heads: Count = 4
    iterations: Count = 8
    """Of the core, in the end-to-end baseline."""
    backprop: Count = 4
    """The last iterations, through which the baseline's gradients go."""
    mlp_ratio: Positive = 8 / 3
    level_dim: Count = 64
    """Width of the level's embedding."""


class ARLMConfig(Section):
    """Autoregressive language model (Llama-style) that denoises the next token's code."""

    noise_defaults: ClassVar[dict[str, Any]] = {"input_scaling": "signal", "overlap": 0.1}
    """Pure noise of unit variance in the stream keeps the top block from learning; the paper's overlap for text."""

    arch: Literal["ar_lm"] = "ar_lm"
    depth: Count = 6
    dim: Count = 128
    heads: Count = 4
    mlp_ratio: Positive = 8 / 3
    level_dim: Count = 64
    """Width of the level's embedding, from which every layer is modulated at every position."""
    stream: Literal["single", "concat"] = "single"
    """`single`: a slot holds a token and the noisy code of the next; `concat`: 2L slots, as in the paper."""


class DigitsConfig(Section):
    """Scikit-learn's digits; needs nothing but the package."""

    source: Literal["digits"] = "digits"
    validation: Share = 0.1


class FashionMnistConfig(Section):
    """Fashion-MNIST from a folder of IDX files, Debian's package, or the hub, in this order."""

    source: Literal["fashion_mnist"] = "fashion_mnist"
    path: str | None = None
    validation: Share = 0.1


class IdxConfig(Section):
    """A folder with the four IDX files of MNIST."""

    source: Literal["idx"] = "idx"
    path: str
    classes: Count = 10
    validation: Share = 0.1


class HuggingFaceConfig(Section):
    """A data set of the hub, or a local path that `datasets` reads."""

    source: Literal["hf"] = "hf"
    path: str
    image: str = "image"
    label: str = "label"
    classes: Count
    validation: Share = 0.1


class TextSection(Section):
    """What every source of text takes; three contiguous parts of it are the splits."""

    tokenizer: str = "letters"
    """`letters` (27), `bytes` (256), or the path of a Hugging Face tokenizer."""
    length: Count = 256
    """Tokens of a sample."""
    validation: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    cache: str | None = None
    """Folder of the packed tokens; by default that of the user's cache."""


class TextConfig(TextSection):
    """Text files: one, or all .txt and .txt.gz files of a folder."""

    source: Literal["text"] = "text"
    path: str


class GcideConfig(TextSection):
    """The dictionary of Debian's package dict-gcide."""

    source: Literal["gcide"] = "gcide"
    path: str | None = None


class PythonTopicsConfig(TextSection):
    """The language reference that comes with Python; needs nothing but Python."""

    source: Literal["python_topics"] = "python_topics"


class HuggingFaceTextConfig(TextSection):
    """A text column of a data set of the hub, or of a local path that `datasets` reads."""

    source: Literal["hf_text"] = "hf_text"
    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"


class LatentsConfig(Section):
    """Latents with classes, from tensor files that some encoder wrote; never a pickle."""

    source: Literal["latents"] = "latents"
    path: str
    """A safetensors file with `latent` (n, C, H, W) and `label` (n,), or a .npy file of the latents."""
    labels: str | None = None
    """A .npy file of the labels, for latents in a .npy file."""
    classes: Count
    scale: Positive | None = None
    """Factor on every latent; by default such that their standard deviation is 0.5."""
    validation: Share = 0.1
    test: Share = 0.1


class CodebookConfig(Section):
    """Target codes, made once, frozen, common to all blocks."""

    source: Literal["random", "orthogonal", "corpus"] = "orthogonal"
    """`corpus`: from which tokens stand near each other in the training text (PPMI, then SVD)."""
    dim: Count = 64


class NoiseConfig(Section):
    """Noise range, its distribution and its split over the blocks."""

    ranges: Literal["calibrated", "equal_information", "paper", "uniform", "explicit", "alpha"] = "calibrated"
    """Where the range and its edges come from; `calibrated` and `equal_information` measure the data with a pilot.
    Architectures without a codebook take another by default, see `noise_defaults`. For masking: `alpha`, equal
    decrements of alpha, or `explicit` masked shares from 1 down to 0."""
    p_mean: float = -1.2
    p_std: Positive = 1.2
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    sigma_data: Positive | None = None
    """Standard deviation of one element of the clean target; by default that of a unit-norm code, 1/sqrt(dim), or 0.5
    for images and latents."""
    edges: tuple[float, ...] | None = None
    """Falling levels, blocks + 1, for `explicit`."""
    overlap: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    weighting: Literal["none", "edm", "clamp", "mean"] = "none"
    input_scaling: Literal["unit", "signal"] = "unit"

    @model_validator(mode="after")
    def _edges_are_for_explicit(self) -> "NoiseConfig":
        if (self.edges is not None) != (self.ranges == "explicit"):
            raise ValueError(f"noise.edges and noise.ranges=explicit go together (ranges={self.ranges})")
        return self


class OptimizerConfig(Section):
    """AdamW, or Muon for the layers' matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-3
    muon_lr: Positive = 0.02
    betas: tuple[Share, Share] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warm-up, before a cosine to `final_lr`."""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step as a share of the peak."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Greatest gradient norm; 0 for none."""

    @model_validator(mode="after")
    def _muon_is_not_clipped(self) -> "OptimizerConfig":
        # DeepSpeed clips Muon's orthogonalised update together with AdamW's gradients under ZeRO, and not without it
        if self.name == "muon" and self.clip:
            raise ValueError(f"optimizer.name=muon needs optimizer.clip=0, not {self.clip}: its updates have unit norm")
        return self


class TrainingConfig(Section):
    """How each block is trained."""

    steps: Count = 600
    batch_size: Count = 128
    """Effective batch: over all workers of a block and all micro-batches."""
    micro_batch: Count | None = None
    """Samples a worker takes at once; by default its whole share of the batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    """`optimizer`: its states to host memory (ZeRO 1 to 3); `all`: the parameters too (ZeRO 3)."""
    compile: bool = False
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass, and compute the rest again: less memory, more time."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights; 0 for none."""
    checkpoint_every: Count = 200
    keep: Annotated[int, Field(ge=2)] = 2
    log_every: Count = 20

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "TrainingConfig":
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("training.offload needs training.zero_stage of 1 or more")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError("training.offload=all needs training.zero_stage=3")
        return self


class BlockResources(Section):
    """What one block asks of the cluster; unset values are those of `cluster`."""

    workers: Count | None = None
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    cpus_per_worker: Positive | None = None
    micro_batch: Count | None = None
    resources: dict[str, float] | None = None


class ClusterConfig(Section):
    """Where blocks run."""

    address: str | None = None
    """Ray cluster: `auto`, `host:port`, `ray://host:port`, or none to start one on this machine alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Count = 1
    """Workers of a block: more than one trains it data-parallel, sharded by training.zero_stage."""
    gpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """GPUs of a worker, when it uses GPUs; a fraction shares one."""
    cpus_per_worker: Positive = 1.0
    resources: dict[str, float] = {}
    """Custom Ray resources that every worker asks for."""
    blocks: dict[int, BlockResources] = {}
    """Exceptions for single blocks."""
    max_crashes: Annotated[int, Field(ge=0)] = 3
    """Restarts of a block after crashes without progress between them."""
    max_preemptions: Annotated[int, Field(ge=0)] = 100
    backoff_s: Annotated[float, Field(ge=0)] = 1.0
    """Pause before the second restart without progress; doubles with each further one, at most 60 s."""
    hang_timeout_s: Positive = 600.0
    """Longest silence of a running block before it is ended and restarted."""
    restart_damaged: bool = False
    """Train a block again from its first step when all its checkpoints are damaged; otherwise it fails and says so."""


class EvaluationConfig(Section):
    """How the merged model is read out."""

    steps_per_block: Count = 1
    readout: Literal["chain", "mean", "first"] = "mean"
    """`chain`: the last evaluation; `mean`: the mean of the chain's predictions; `first`: block 0 alone."""
    start: Literal["zero", "noise"] = "zero"
    """Where the chain starts: noise, as in the paper, or its mean, which makes a classifier deterministic."""
    batch_size: Count = 512
    metric: str | None = None
    """An entry of evaluation/metrics.py; by default the architecture's own."""
    samples: Annotated[int, Field(ge=2)] = 10_000
    """Samples drawn for a distance between distributions."""
    steps: Count = 50
    """Noise levels of a drawn sample."""
    solver: Literal["euler", "heun"] = "euler"
    spacing: Literal["karras", "slices"] = "karras"
    """Steps by EDM's schedule over the whole range, or the same number in every slice."""
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
    """Folder of a causal language model of Hugging Face that `metric: generated` asks for the perplexity of texts."""
    texts: Count | None = None
    """At most so many samples of a split are measured in bits, spread evenly over it; by default all."""


class TelemetryConfig(Section):
    """Where metrics go besides the JSONL events."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    project: str = "dbtrain"


ModelConfig = Annotated[
    ViTConfig | DiTConfig | MaskedLMConfig | RecurrentConfig | ARLMConfig, Field(discriminator="arch")
]
DataConfig = Annotated[
    DigitsConfig
    | FashionMnistConfig
    | IdxConfig
    | HuggingFaceConfig
    | TextConfig
    | GcideConfig
    | PythonTopicsConfig
    | HuggingFaceTextConfig
    | LatentsConfig,
    Field(discriminator="source"),
]


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    out: str = "runs"
    """Directory or URL below which the run gets its own directory, named `name`."""
    seed: int = 0
    method: Literal["diffusion_blocks", "end_to_end", "ensemble", "joint", "greedy", "forward_forward"] = (
        "diffusion_blocks"
    )
    """How blocks are trained: isolated, as the paper has it, or as a baseline; `dbtrain baseline` sets it."""
    blocks: Count = 3
    layers_per_block: tuple[Count, ...] | None = None
    model: ModelConfig
    data: DataConfig
    codebook: CodebookConfig = CodebookConfig()
    noise: NoiseConfig = NoiseConfig()
    training: TrainingConfig = TrainingConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _noise_of_the_architecture(self) -> "Config":
        silent = {k: v for k, v in self.model.noise_defaults.items() if k not in self.noise.model_fields_set}
        # sections are frozen for everyone else
        object.__setattr__(self, "noise", self.noise.model_copy(update=silent))
        return self

    @model_validator(mode="after")
    def _end_to_end_is_one_block(self) -> "Config":
        if self.method == "end_to_end" and self.blocks != 1:
            raise ValueError(f"method=end_to_end trains one block, not blocks={self.blocks}")
        unknown = [b for b in self.cluster.blocks if not 0 <= b < self.blocks]
        if unknown:
            raise ValueError(f"cluster.blocks names block {unknown[0]}; the last is {self.blocks - 1}")
        return self

    @property
    def run_url(self) -> str:
        """Directory or URL of the run."""
        return f"{self.out.rstrip('/')}/{self.name}"

    def content(self) -> dict[str, Any]:
        """Everything that determines the weights; where a run is and how it is observed does not."""
        content = self.model_dump(mode="json", exclude={"out", "cluster", "evaluation", "telemetry"})
        content["data"].pop("cache", None)
        training = content["training"]
        for key in ("micro_batch", "zero_stage", "offload", "compile", "checkpoint_every", "keep", "log_every"):
            training.pop(key)
        training.pop("activation_checkpointing")
        return content

    def content_hash(self) -> str:
        """Hash of :meth:`content`, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: str | Path | None, overrides: Sequence[str] = (), base: dict[str, Any] | None = None) -> Config:
    """Read a YAML file and apply overrides such as ``model.depth=12``.

    Raises:
        ConfigError: the file is missing or no YAML, an override is malformed, a key unknown or a value wrong.
    """
    try:
        loaded = OmegaConf.create(base or {}) if path is None else OmegaConf.load(path)
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(_checked(overrides)))
        content = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}; those that are shipped lie in configs/") from None
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path} is no file of keys and values in YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        raise
    return parse_config(content, str(path or "the configuration"))


def _checked(overrides: Sequence[str]) -> list[str]:
    for override in overrides:
        if not OVERRIDE.match(override):
            raise ConfigError(f"{override!r} is no override: write key=value, for instance model.depth=12")
    return list(overrides)


def parse_config(content: Any, where: str) -> Config:
    """Validate a plain mapping.

    Raises:
        ConfigError: one line for all that is wrong.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values, not {type(content).__name__}")
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in _without_tag(error["loc"]))
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {place}; {hint}"
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    return f"{place}={given}: {message}" if place and not isinstance(given, dict) else message


def _without_tag(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys as a user writes them: pydantic also names the member of a union, by its discriminator."""
    field = Config.model_fields.get(str(loc[0])) if loc else None
    tagged = field is not None and len(_sections(field.annotation)) > 1
    return (loc[0], *loc[2:]) if tagged else loc


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    section: Any = Config
    for part in loc[:-1]:
        candidates = _sections(section.model_fields[part].annotation) if part in section.model_fields else [section]
        # the location of an error inside a union also names the member, by its discriminator
        tag = loc[loc.index(part) + 1] if loc.index(part) + 1 < len(loc) - 1 else None
        section = next((c for c in candidates if _tag(c) == tag), candidates[0]) if candidates else section
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _tag(section: type[Section]) -> Any:
    for key in ("arch", "source"):
        if key in section.model_fields:
            return section.model_fields[key].default
    return None
