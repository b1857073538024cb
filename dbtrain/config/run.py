"""A whole run: all sections together."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dbtrain.config.cluster import ClusterConfig
from dbtrain.config.data import DataConfig, absolute_paths
from dbtrain.config.evaluation import EvaluationConfig, TelemetryConfig
from dbtrain.config.model import ModelConfig, RecurrentConfig
from dbtrain.config.noise import CodebookConfig, NoiseConfig
from dbtrain.config.section import Count, Section
from dbtrain.config.training import TrainingConfig


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
    def _heads_share_the_width(self) -> "Config":
        # told here, before any data is read or a pilot is trained
        dim, heads, pair = self.model.dim, self.model.heads, 2 if self.model.rotary else 1
        if dim % (pair * heads):
            fitting = [n for n in range(1, dim + 1) if dim % (pair * n) == 0]
            near = sorted(sorted(fitting, key=lambda n: abs(n - heads))[:3])
            kind = "an even multiple" if self.model.rotary else "a multiple"
            instead = f"model.heads={' or '.join(map(str, near))}, or " if near else ""
            wider = -(-dim // (pair * heads)) * pair * heads
            raise ValueError(f"model.dim={dim} is not {kind} of model.heads={heads}: set {instead}model.dim={wider}")
        if isinstance(self.model, RecurrentConfig) and self.model.backprop > self.model.iterations:
            raise ValueError(
                f"model.backprop={self.model.backprop} is more than model.iterations={self.model.iterations}: set "
                "it to at most that"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit_the_method(self) -> "Config":
        if self.method == "end_to_end" and self.blocks != 1:
            raise ValueError(f"method=end_to_end trains one block, not blocks={self.blocks}")
        for section, exceptions in (("cluster", self.cluster.blocks), ("training", self.training.blocks)):
            unknown = [b for b in exceptions if not 0 <= b < self.blocks]
            if unknown:
                raise ValueError(
                    f"{section}.blocks names block {unknown[0]}; the last is {self.blocks - 1}: mend it, or set "
                    f"{section}.blocks=null"
                )
        if self.training.blocks and self.method in ("joint", "forward_forward"):
            raise ValueError(f"method={self.method} has one optimizer for all blocks: leave training.blocks out")
        return self

    @property
    def run_url(self) -> str:
        """Directory or URL of the run."""
        return f"{self.out.rstrip('/')}/{self.name}"

    def for_workers(self) -> "Config":
        """The same run as processes elsewhere read it: Ray Train gives each worker a working directory of its own."""
        return self.model_copy(update={"data": absolute_paths(self.data)})

    def content(self) -> dict[str, Any]:
        """Everything that determines the weights; where a run is and how it is observed does not."""
        content = self.model_dump(mode="json", exclude={"out", "cluster", "evaluation", "telemetry"})
        content["data"].pop("cache", None)
        for key in getattr(self.data, "added_later", ()):
            if getattr(self.data, key) == type(self.data).model_fields[key].default:
                content["data"].pop(key)
        training = content["training"]
        for key in ("micro_batch", "zero_stage", "offload", "compile", "checkpoint_every", "keep", "log_every"):
            training.pop(key)
        training.pop("activation_checkpointing")
        if not training["blocks"]:
            # so that runs from before there were exceptions go on
            training.pop("blocks")
        return content

    def content_hash(self) -> str:
        """Hash of :meth:`content`, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]
