"""Run by torchrun: snapshot and restore under every ZeRO stage, optimizer and offload; prints one line a case."""

import json
import math
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dbtrain.config import OptimizerConfig, TrainingConfig
from dbtrain.training.engine import Engine

BATCH, CUT, STEPS = 12, 3, 6
Parts = dict[str, dict[str, Tensor]]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"0": nn.Linear(6, 9), "1": nn.Linear(9, 7)})
        self.head = nn.Linear(7, 5)

    def forward(self, batch: dict[str, Tensor], key: Tensor, positions: Tensor) -> Tensor:
        x = batch["x"]
        for layer in self.layers.values():
            x = layer(x).tanh()
        return self.head(x).pow(2).mean()


def make(stage: int, optimizer: str, accumulation: int = 1, offload: Any = "none") -> Engine:
    torch.manual_seed(0)
    settings = OptimizerConfig(name=optimizer, clip=0.0 if optimizer == "muon" else 1.0)  # type: ignore[arg-type]
    config = TrainingConfig(zero_stage=stage, optimizer=settings, ema=0.9, offload=offload)  # type: ignore[arg-type]
    workers = dist.get_world_size()
    return Engine(Toy(), config, BATCH // workers // accumulation, accumulation, workers)


def advance(engine: Engine, start: int, stop: int, accumulation: int = 1) -> Parts:
    for step in range(start, stop):
        whole = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))
        engine.set_lr(1.0)
        for part in whole.chunk(dist.get_world_size())[dist.get_rank()].chunk(accumulation):
            engine.accumulate({"x": part}, torch.tensor(0), torch.arange(len(part)))
        engine.update_ema(step + 1)
    shared = [engine.snapshot()]
    dist.broadcast_object_list(shared, src=0)  # the other ranks get no copy of their own
    return shared[0]


def distance(one: Parts, two: Parts) -> float:
    return max(float((one[p][n] - two[p][n]).abs().max()) for p in one for n in one[p])


def case(stage: int, optimizer: str, offload: str, reference: tuple[Parts, Parts]) -> dict[str, Any]:
    engine = make(stage, optimizer, offload=offload)
    middle = advance(engine, 0, CUT)
    end = advance(engine, CUT, STEPS)
    again = make(stage, optimizer, offload=offload)
    again.restore(middle, CUT)
    resumed = advance(again, CUT, STEPS)
    crossed = make(stage, optimizer, offload=offload)
    crossed.restore(reference[0], CUT)
    return {
        "case": f"{optimizer} zero{stage} offload={offload}",
        "bitwise": all(torch.equal(end[p][n], resumed[p][n]) for p in end for n in end[p]),
        "moved": distance(middle, end),
        "from_zero0": distance(advance(crossed, CUT, STEPS), reference[1]),
    }


def norms(stage: int, optimizer: str) -> dict[str, Any]:
    """The gradient norm of the first step, beside that of the same batch without an engine."""
    torch.manual_seed(0)
    toy = Toy()
    whole = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(0))
    toy({"x": whole}, torch.tensor(0), torch.arange(BATCH)).backward()
    wanted = math.sqrt(sum(float(p.grad.double().square().sum()) for p in toy.parameters() if p.grad is not None))
    engine = make(stage, optimizer, 2)
    advance(engine, 0, 1, 2)
    return {
        "case": f"{optimizer} zero{stage} norm",
        "norm": float(engine.gradient_norm) if engine.norm_is_of_gradient else None,
        "wanted": wanted,
    }


def frozen(stage: int) -> dict[str, Any]:
    """A greedy block's module: what is frozen is neither moved nor stored."""
    torch.manual_seed(0)
    toy = Toy()
    toy.layers["0"].requires_grad_(False)
    before, size = toy.layers["0"].weight.detach().clone(), BATCH // dist.get_world_size()
    engine = Engine(toy, TrainingConfig(zero_stage=stage, ema=0.9), size, 1, dist.get_world_size())  # type: ignore[arg-type]
    snapshot = advance(engine, 0, CUT)
    with deepspeed.zero.GatheredParameters([toy.layers["0"].weight], enabled=stage == 3):
        kept = torch.equal(toy.layers["0"].weight, before)
    return {"case": f"frozen zero{stage}", "kept": kept, "stored": sorted(snapshot["model"])}


def main() -> None:
    dist.init_process_group("gloo")
    results = []
    for optimizer in ("adamw", "muon"):
        engine = make(0, optimizer)
        reference = (advance(engine, 0, CUT), advance(engine, CUT, STEPS))
        cases = [(stage, "none") for stage in range(4)]
        if optimizer == "adamw":
            cases += [(1, "optimizer"), (3, "all")]
        results += [case(stage, optimizer, offload, reference) for stage, offload in cases]
        cut = advance(make(0, optimizer, 2), 0, STEPS, 2)
        results.append({"case": f"{optimizer} accumulated", "difference": distance(cut, reference[1])})
    results += [frozen(stage) for stage in range(4)]
    results += [norms(stage, "adamw") for stage in range(4)] + [norms(0, "muon"), norms(1, "muon")]
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as out:
            json.dump(results, out)


if __name__ == "__main__":
    main()
