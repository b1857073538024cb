"""A whole run: all sections together."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dbtrain.config.cluster import ClusterConfig
from dbtrain.config.data import DataConfig, absolute_paths
from dbtrain.config.evaluation import EvaluationConfig, TelemetryConfig
from dbtrain.config.init import AnyInit, InitConfig
from dbtrain.config.model import AnyModel
from dbtrain.config.noise import CodebookConfig, NoiseConfig
from dbtrain.config.section import Count, Section
from dbtrain.config.training import BlockTraining, TrainingConfig
from dbtrain.errors import ConfigError
from dbtrain.method.loops import check_loops
from dbtrain.method.noise_processes import noise_process, others_settings
from dbtrain.models.registry import architecture


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
    """Layers of each block, block 0 first, which sees the strongest noise; by default equal shares, as far as
    they go."""
    model: AnyModel
    data: DataConfig
    codebook: CodebookConfig = CodebookConfig()
    noise: NoiseConfig = NoiseConfig()
    training: TrainingConfig = TrainingConfig()
    init: AnyInit = InitConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _noise_of_the_architecture(self) -> "Config":
        name = self.noise_process
        try:
            process, kind = noise_process(name), architecture(self.model.arch)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if process.noises != kind.noised:
            raise ValueError(
                f"noise.process={name} makes {process.noises} noisy, and model.arch={self.model.arch} denoises "
                f"{kind.noised}: leave noise.process out, which is then {self.natural_process}"
            )
        foreign = [
            (other, key)
            for other, key in others_settings(name)
            if getattr(self.noise, key) != NoiseConfig.model_fields[key].default
        ]
        if foreign:
            other, key = foreign[0]
            raise ValueError(
                f"noise.{key}={getattr(self.noise, key)} is for noise.process={other}, and this is {name}: leave it out"
            )
        # what an architecture has for its own process is not for another
        defaults = kind.noise_defaults if name == self.natural_process else {"ranges": process.policies[0]}
        silent = {key: value for key, value in defaults.items() if key not in self.noise.model_fields_set}
        # sections are frozen for everyone else
        object.__setattr__(self, "noise", self.noise.model_copy(update={**silent, "process": name}))
        return self

    @model_validator(mode="after")
    def _keys_of_the_model_fit(self) -> "Config":
        try:
            check_loops(self.model.loops, self.model.depth)
            architecture(self.model.arch).check(self.model.arguments() | {"loops": self.model.loops})
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _blocks_fit_the_method(self) -> "Config":
        if self.method == "end_to_end" and self.blocks != 1:
            raise ValueError(f"method=end_to_end trains one block, not blocks={self.blocks}")
        for section, exceptions in (("cluster", self.cluster.blocks), ("training", self.training.blocks)):
            unknown = [b for b in exceptions if not 0 <= b < self.blocks]
            if unknown:
                raise ValueError(
                    f"{section}.blocks names block {unknown[0]}; the last is {self.blocks - 1}: fix it, or set "
                    f"{section}.blocks=null"
                )
        if self.training.blocks and self.method in ("joint", "forward_forward"):
            raise ValueError(f"method={self.method} has one optimizer for all blocks: leave training.blocks out")
        return self

    @model_validator(mode="after")
    def _init_fits_the_method(self) -> "Config":
        from dbtrain.method.schemes import SCHEMES  # not above: it imports torch, which --help can do without

        init, scheme = self.init, SCHEMES[self.method]
        if (init.source is not None or init.branch) and scheme.starts_random:
            raise ValueError(f"method={self.method} starts from random weights only: leave init out")
        if scheme.shared and (init.layers == "repeat" or init.branch):
            raise ValueError(
                f"method={self.method} trains all blocks as one network, which starts from one of the same depth: "
                f"{'leave init.branch out' if init.branch else 'set init.layers=slice'}"
            )
        return self

    @property
    def natural_process(self) -> str:
        """The noise process that the architecture is made for."""
        return architecture(self.model.arch).natural_noise

    @property
    def noise_process(self) -> str:
        """The noise process that is chosen."""
        return self.noise.process or self.natural_process

    @property
    def run_url(self) -> str:
        """Directory or URL of the run."""
        return f"{self.out.rstrip('/')}/{self.name}"

    def for_workers(self) -> "Config":
        """The same run as processes elsewhere read it: Ray Train
        gives each worker a working directory of its own."""
        return self.model_copy(update={"data": absolute_paths(self.data)})

    def content(self) -> dict[str, Any]:
        """Everything that determines the weights; where a run is and how it is observed does not."""
        content = self.model_dump(mode="json", exclude={"out", "cluster", "evaluation", "telemetry"})
        content["model"] = self.model.content()
        content["data"].pop("cache", None)
        if self.noise_process == self.natural_process:
            # so that runs from before there was a choice go on
            content["noise"].pop("process")
        for _, key in others_settings(self.noise_process):
            content["noise"].pop(key)
        for key in getattr(self.data, "added_later", ()):
            if getattr(self.data, key) == type(self.data).model_fields[key].default:
                content["data"].pop(key)
        content["init"] = self.init.content()
        if not content["init"]:
            content.pop("init")
        training = content["training"]
        for key in ("micro_batch", "zero_stage", "offload", "compile", "deterministic"):
            training.pop(key)
        for key in ("activation_checkpointing", "checkpoint_every", "keep", "keep_optimizer", "log_every"):
            training.pop(key)
        training.pop("validate_every")
        optimizer = training["optimizer"]
        if optimizer["schedule"] == "cosine":
            # so that runs from before there was a choice go on
            optimizer.pop("schedule"), optimizer.pop("decay")
        if not training["blocks"]:
            # so that runs from before there were exceptions go on
            training.pop("blocks")
        for own in training.get("blocks", {}).values():
            for key in BlockTraining.added_later:
                if own[key] is None:
                    own.pop(key)
        return content

    def content_hash(self) -> str:
        """Hash of :meth:`content`, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]
