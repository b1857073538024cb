"""DeepSpeed around one block.

DeepSpeed gives ZeRO 0 to 3, offload, clipping and accumulation. What goes to disk are full float32 tensors by
parameter name, so a block resumes under another ZeRO stage or on another number of workers.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dbtrain.config import TrainingConfig
from dbtrain.errors import ShardError
from dbtrain.models.layers import compile_recomputed
from dbtrain.training.deepspeed_import import deepspeed
from dbtrain.training.host_copies import FromGpu, FromHost, HostCopies, Snapshot
from dbtrain.training.optimizer import adamw, parameter_groups
from dbtrain.training.zero_tensors import MOMENTUM, layout_of

ADAM_STATES = ("exp_avg", "exp_avg_sq")
MUON_STATES = (MOMENTUM,)
SMALLEST_PART = 1 << 22
"""Elements that are worth a collective of their own: 16 MiB."""


def _sizes(elements: int) -> dict[str, int]:
    """How many elements of a block of so many DeepSpeed reduces, gathers, fetches and steps at a time.

    Its own sizes are for models of many billions of parameters, whatever the model's size: it would allocate
    2 GB, which the deterministic mode fills in every step, and keep all that ZeRO 3 has gathered once.
    """
    part = min(elements, max(elements // 8, SMALLEST_PART))
    part += part % 2  # DeepSpeed wants it even
    return {
        "reduce_bucket_size": part,
        "allgather_bucket_size": part,
        "sub_group_size": part,
        "stage3_prefetch_bucket_size": part,
        "stage3_max_live_parameters": 2 * part,
        "stage3_max_reuse_distance": 2 * part,
        "stage3_param_persistence_threshold": min(100_000, elements // 1000),
    }


def _deepspeed_config(
    config: TrainingConfig, elements: int, micro_batch: int, accumulation: int, workers: int
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage, **_sizes(elements)}
    if config.optimizer.name == "muon":
        zero |= {"reduce_scatter": False, "save_muon_momentum_buffer_in_memory": True}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": micro_batch * accumulation * workers,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # without ZeRO we clip ourselves: DeepSpeed's loop over the parameters waits for the GPU in every step
        "gradient_clipping": config.optimizer.clip if config.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
        # this timer waits for the GPU before and after every micro-batch, and nothing reads it
        "timers": {"throughput": {"enabled": False}},
    }


def _optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(module, config.optimizer)
    if config.optimizer.name == "adamw":
        return adamw([{k: v for k, v in group.items() if k != "use_muon"} for group in groups])
    # it imports torch's compiler: seconds, of every worker's start
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


class Engine:
    """One block's module under DeepSpeed, on this worker.

    Args:
        module: returns a scalar loss; its parameter names are those on disk,
            its submodule `model` has the layers.
        config: training section.
        micro_batch, accumulation, workers: their product is the effective batch.
        tell: gets one line if host memory for snapshots cannot be pinned.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        micro_batch: int,
        accumulation: int,
        workers: int,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=_optimizer(module, config),
            config=_deepspeed_config(config, elements, micro_batch, accumulation, workers),
        )
        if config.zero_stage == 0 and workers == 1:
            # DeepSpeed would copy all gradients to a bucket and back for an all-reduce among one
            self._engine.enable_backward_allreduce = False
        self._layout = layout_of(self._engine, config.zero_stage)
        base = self._engine.optimizer.optimizer if config.zero_stage else self._engine.optimizer
        self._base: torch.optim.Optimizer = base
        self._peaks = [float(group["lr"]) for group in base.param_groups]
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._gradient_norm = torch.zeros(())
        if config.zero_stage == 0:
            base.register_step_pre_hook(self._measure(config.optimizer.clip))
            # DeepSpeed's own walks over all modules by name, in every step while the GPU waits for work
            self._engine.zero_grad = self._drop_gradients
        self.norm_is_of_gradient = not (config.zero_stage and config.optimizer.name == "muon")
        """Whether `gradient_norm` is that; under ZeRO Muon's
        matrices are orthogonalised before DeepSpeed takes it."""
        self._make_states()
        self._ema = self._pieces() if config.ema else {}
        self._ema_decay = config.ema
        device = torch.device(self._engine.device)
        self._copies = HostCopies(self._shapes(), FromGpu(device) if device.type == "cuda" else FromHost(), tell)
        if config.compile and config.activation_checkpointing:
            compile_recomputed(module.get_submodule("model"))
        elif config.compile:
            self._engine.compile()

    @property
    def zero_stage(self) -> int:
        """Stage of ZeRO, as DeepSpeed has it."""
        return int(self._engine.zero_optimization_stage())

    @property
    def names(self) -> list[str]:
        """Names of the parameters that are trained."""
        return list(self._parameters)

    def _make_states(self) -> None:
        # DeepSpeed and PyTorch make them at the first step; a resumed block needs them before
        for owner, group in self._layout.owners():
            state = self._base.state[owner]
            if group.get("use_muon"):
                # ZeRO 3 has made it, and holds it by another name too
                if MOMENTUM not in state:
                    state[MOMENTUM] = self._layout.momentum(owner)
                continue
            for name in ADAM_STATES:
                state.setdefault(name, torch.zeros_like(owner, requires_grad=False))
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device)

    def _measure(self, clip: float) -> Callable[..., None]:
        """A hook that takes the norm of all gradients, and scales them to at most `clip`;
        0 for no such limit."""

        def measure(*_: Any) -> None:
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            self._gradient_norm = norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
            if clip:
                torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), clip, norm, foreach=True)

        return measure

    def _drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _pieces(self) -> dict[str, Tensor]:
        pieces = ((n, self._layout.piece(p, None)) for n, p in self._parameters.items())
        return {n: piece.detach().clone() for n, piece in pieces if piece is not None}

    def accumulate(self, batch: Mapping[str, Tensor], key: Tensor, positions: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; its mean loss,
        detached. The last one of a step also updates."""
        loss: Tensor = self._engine(batch, key, positions)
        self._engine.backward(loss)
        self._copies.before_update()
        self._engine.step()
        return loss.detach()

    @property
    def gradient_norm(self) -> Tensor:
        """Norm of the gradient of the last step over all workers, before clipping; a scalar on the device.

        Under ZeRO a step whose norm is not finite was skipped, and that of Muon's matrices is of their
        updates.
        """
        if not self.zero_stage:
            return self._gradient_norm
        norm = math.inf if self._engine.optimizer.overflow else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32)

    def set_lr(self, scale: float) -> None:
        """Set every group's learning rate to `scale` times its peak, before the step that uses it."""
        for group, peak in zip(self._base.param_groups, self._peaks, strict=True):
            group["lr"] = peak * scale

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Average the weights after `step` steps; the decay warms up, so that the start is soon forgotten."""
        if not self._ema:
            return
        decay = min(self._ema_decay, (1 + step) / (10 + step))
        current = [self._layout.piece(self._parameters[name], None) for name in self._ema]
        torch._foreach_lerp_(list(self._ema.values()), [c for c in current if c is not None], 1 - decay)

    @torch.no_grad()
    def measure(self, batches: Iterable[tuple[Mapping[str, Tensor], Tensor, Tensor]]) -> Tensor:
        """Mean loss of batches of one size on this worker, a scalar; by the averaged weights if it has some.

        A collective under ZeRO. Weights, averages, modes and random numbers are afterwards what they were.
        """
        device = torch.device(self._engine.device)
        modes = [(part, part.training) for part in self._engine.modules()]
        self._copies.before_update()  # of a snapshot, which are made of what is exchanged here
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._engine.eval()
            self._with_averages(self._layout.lend)
            losses = torch.stack([self._engine(*batch).float() for batch in batches])
            self._with_averages(self._layout.take_back)
        for part, mode in modes:
            part.training = mode
        return losses.mean()

    def _with_averages(self, act: Callable[[nn.Parameter, Tensor | None], None]) -> None:
        for name, parameter in self._parameters.items() if self._ema_decay else ():
            act(parameter, self._ema.get(name))

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """Full float32 copies on the host: parts ``model``,
        ``ema`` and ``optim``, by parameter name; collective.

        Only the first rank's snapshot has tensors: it alone writes, and a copy per rank would not fit into
        the host's memory. The copies go on when this returns.
        """
        snapshot = self._copies.begin()
        for part, key, parameter, piece in self._held():
            full = self._layout.gather(parameter, piece)  # of all ranks: each must take part
            if dist.get_rank() == 0:
                self._copies.copy(snapshot, part, key, full, passing=full is not piece)
        self._copies.end(snapshot)
        return snapshot

    def _shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """What a snapshot has on this rank, with the full shapes."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {"model": {}, "optim": {}}
        if self._ema_decay:
            shapes["ema"] = {}
        for part, key, parameter, _ in self._held() if dist.get_rank() == 0 else ():
            shapes[part][key] = _shape(parameter)
        return shapes

    def _held(self) -> Iterator[tuple[str, str, nn.Parameter, Tensor | None]]:
        """(part, key, parameter, this rank's piece) of all that is committed."""
        for name, parameter in self._parameters.items():
            yield "model", name, parameter, self._layout.piece(parameter, None)
            if self._ema_decay:
                yield "ema", name, parameter, self._ema.get(name)
            for state in self._states(parameter):
                yield "optim", f"{state}/{name}", parameter, self._layout.piece(parameter, state)

    @torch.no_grad()
    def non_finite(self) -> str | None:
        """The first tensor of a snapshot that is NaN or infinite somewhere, None if there is none.

        A collective: all workers give the same answer.
        """
        held = list(self._held())
        flags = [torch.ones(()) if piece is None else piece.isfinite().all() for _, _, _, piece in held]
        finite = torch.stack([flag.to(self._engine.device, torch.float32) for flag in flags])
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        return next((_words(*h[:2]) for h, ok in zip(held, finite.tolist(), strict=True) if not ok), None)

    @staticmethod
    def _states(parameter: nn.Parameter) -> tuple[str, ...]:
        return MUON_STATES if getattr(parameter, "use_muon", False) else ADAM_STATES

    @torch.no_grad()
    def begin(self, weights: Iterable[tuple[str, Tensor]], where: str, new: Collection[str] = ()) -> None:
        """Start from these weights, with the same average and a fresh optimizer, before the first step.

        Args:
            weights: full float32 tensors by parameter name; one at a time is in memory.
            where: what they are from, for messages.
            new: parameters that are in no source, and stay as the model was made.

        Raises:
            ShardError: a parameter's is missing or has another shape.
        """
        left = {name: parameter for name, parameter in self._parameters.items() if name not in new}
        for name, value in weights:
            parameter = left.pop(name)
            given = {"weights": {name: value}}
            self._set(name, _take(given, "weights", name, _shape(parameter), parameter))
            if self._ema_decay:
                self._layout.scatter(parameter, value.to(parameter.device), self._ema.get(name))
        if left:
            raise ShardError(f"{where} has no {', '.join(sorted(left))}, which this block trains")

    def _set(self, name: str, value: Tensor) -> None:
        parameter = self._parameters[name]
        self._layout.scatter(parameter, value, self._layout.piece(parameter, None))
        self._layout.assign(parameter, value)

    @torch.no_grad()
    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Continue from a snapshot taken after `step` steps, under any ZeRO stage and number of workers.

        Without a part ``optim`` the optimizer's state starts anew.

        Raises:
            ShardError: a tensor is missing or has another shape.
        """
        for name, parameter in self._parameters.items():
            shape = _shape(parameter)
            self._set(name, _take(parts, "model", name, shape, parameter))
            if self._ema_decay:
                average = _take(parts, "ema", name, shape, parameter)
                self._layout.scatter(parameter, average, self._ema.get(name))
            for state in self._states(parameter) if "optim" in parts else ():
                full = _take(parts, "optim", f"{state}/{name}", shape, parameter)
                self._layout.scatter(parameter, full, self._layout.piece(parameter, state))
        for owner, group in self._layout.owners():
            if not group.get("use_muon"):
                # that of AdamW counts the steps of its moments
                self._base.state[owner]["step"].fill_(step if "optim" in parts else 0)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, of which ZeRO 3 holds a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _words(part: str, key: str) -> str:
    """How messages call a tensor of a snapshot."""
    if part == "optim":
        state, _, name = key.partition("/")
        return f"the optimizer's {state} of {name}"
    return f"the average of {key}" if part == "ema" else f"the weight {key}"


def _take(
    parts: Mapping[str, Mapping[str, Tensor]], part: str, name: str, shape: tuple[int, ...], like: Tensor
) -> Tensor:
    tensor = parts.get(part, {}).get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise ShardError(
            f"the checkpoint's {part} has {found} for {name}, which needs shape {shape}: it was written by another "
            "model or optimizer; use another run name, or the configuration it was written with"
        )
    return tensor.to(like.device)
