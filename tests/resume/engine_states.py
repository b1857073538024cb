"""Run by torchrun: snapshot and restore under every ZeRO stage, optimizer and offload; prints one line a case."""

import gc
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
from tests.process_group import process_group

BATCH, CUT, STEPS = 12, 3, 6
Parts = dict[str, dict[str, Tensor]]


class Toy(nn.Module):
    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.25)
        self.layers = nn.ModuleDict({"0": nn.Linear(6, 9), "1": nn.Linear(9, width)})
        self.head = nn.Linear(width, 5)

    def forward(self, batch: dict[str, Tensor], key: Tensor, positions: Tensor) -> Tensor:
        x = batch["x"]
        for layer in self.layers.values():
            x = self.dropout(layer(x).tanh()) if "dropout" in batch else layer(x).tanh()
        return self.head(x).pow(2).mean()


def make(
    stage: int, optimizer: str, accumulation: int = 1, offload: Any = "none", seed: int = 0, width: int = 7
) -> Engine:
    torch.manual_seed(seed)
    settings = OptimizerConfig(name=optimizer, clip=0.0 if optimizer == "muon" else 1.0)  # type: ignore[arg-type]
    config = TrainingConfig(zero_stage=stage, optimizer=settings, ema=0.9, offload=offload)  # type: ignore[arg-type]
    workers = dist.get_world_size()
    return Engine(Toy(width), config, BATCH // workers // accumulation, accumulation, workers)


def advance(engine: Engine, start: int, stop: int, accumulation: int = 1) -> Parts:
    for step in range(start, stop):
        whole = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))
        engine.set_lr(1.0)
        for part in whole.chunk(dist.get_world_size())[dist.get_rank()].chunk(accumulation):
            engine.accumulate({"x": part}, torch.tensor(0), torch.arange(len(part)))
        engine.update_ema(step + 1)
    shared = [engine.snapshot().parts]
    dist.broadcast_object_list(shared, src=0)  # the other ranks get no copy of their own
    return shared[0]


def bitwise(one: Parts, two: Parts) -> bool:
    return all(torch.equal(one[p][n], two[p][n]) for p in one for n in one[p])


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
        "bitwise": bitwise(end, resumed),
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


def frozen(stage: int, optimizer: str) -> dict[str, Any]:
    """What is frozen is neither moved nor stored, and a resume without it is bitwise the same."""
    toys: list[Toy] = []

    def make_frozen() -> Engine:
        torch.manual_seed(0)
        toys.append(Toy())
        toys[-1].layers["0"].requires_grad_(False)
        settings = OptimizerConfig(name=optimizer, clip=0.0 if optimizer == "muon" else 1.0)  # type: ignore[arg-type]
        config = TrainingConfig(zero_stage=stage, optimizer=settings, ema=0.9)  # type: ignore[arg-type]
        return Engine(toys[-1], config, BATCH // dist.get_world_size(), 1, dist.get_world_size())

    engine = make_frozen()
    torch.manual_seed(0)
    before = Toy().layers["0"].weight
    middle = advance(engine, 0, CUT)
    end = advance(engine, CUT, STEPS)
    with deepspeed.zero.GatheredParameters([toys[0].layers["0"].weight], enabled=stage == 3):
        kept = torch.equal(toys[0].layers["0"].weight, before)
    again = make_frozen()
    again.restore(middle, CUT)
    same = bitwise(end, advance(again, CUT, STEPS))
    return {"case": f"frozen {optimizer} zero{stage}", "kept": kept and same, "stored": sorted(middle["model"])}


def begun(stage: int, optimizer: str) -> dict[str, Any]:
    """Weights that an engine begins from are those of its first snapshot and of its average, and train on from there
    as those of a module that had them when it was made."""
    torch.manual_seed(7)
    weights = {name: p.detach().clone() for name, p in Toy().named_parameters()}
    engine = make(stage, optimizer)
    engine.begin(iter(weights.items()), "somewhere")
    first = advance(engine, 0, 0)
    given = all(torch.equal(first[part][name], weights[name]) for part in ("model", "ema") for name in weights)
    fresh = all(not tensor.any() for tensor in first["optim"].values())
    born = make(stage, optimizer, seed=7)
    same = bitwise(advance(engine, 0, CUT), advance(born, 0, CUT))
    return {"case": f"begun {optimizer} zero{stage}", "begun": given and fresh and same}


def measured(stage: int, optimizer: str, offload: Any = "none") -> dict[str, Any]:
    """A block that is measured between its steps ends with the bits of one that is not, and by its averages."""
    width = 700  # so wide that ZeRO 3 keeps the small parameters gathered
    engine, plain = (make(stage, optimizer, offload=offload, width=width) for _ in range(2))
    held = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(99))
    mine = held.chunk(dist.get_world_size())[dist.get_rank()]
    kept = True
    for step in range(STEPS):
        parts = advance(engine, step, step + 1)
        before = torch.get_rng_state()
        loss = engine.measure(
            [({"x": part, "dropout": part}, torch.tensor(0), torch.arange(3)) for part in mine.split(2)]
        )
        kept &= torch.equal(torch.get_rng_state(), before) and engine._engine.training
        kept &= bitwise(parts, advance(engine, 0, 0)) and bitwise(parts, advance(plain, step, step + 1))
    toy = Toy(width)
    toy.load_state_dict(parts["ema"])
    with torch.no_grad():
        wanted = float(toy({"x": mine}, torch.tensor(0), torch.arange(3)))
    return {
        "case": f"measured {optimizer} zero{stage} {offload}",
        "measured": kept,
        "loss": float(loss),
        "wanted": wanted,
    }


def main() -> None:
    results = []
    for optimizer in ("adamw", "muon"):
        engine = make(0, optimizer)
        gc.freeze()  # ZeRO 3 collects whenever an engine is made: not again through all that is imported by now
        reference = (advance(engine, 0, CUT), advance(engine, CUT, STEPS))
        cases = [(stage, "none") for stage in range(4)]
        if optimizer == "adamw":
            cases += [(1, "optimizer"), (3, "all")]
        results += [case(stage, optimizer, offload, reference) for stage, offload in cases]
        cut = advance(make(0, optimizer, 2), 0, STEPS, 2)
        results.append({"case": f"{optimizer} accumulated", "difference": distance(cut, reference[1])})
    kinds = [(stage, optimizer) for optimizer in ("adamw", "muon") for stage in range(4)]
    results += [one(stage, optimizer) for one in (frozen, begun) for stage, optimizer in kinds]
    results += [measured(stage, optimizer) for stage, optimizer in kinds]
    results += [measured(1, "adamw", "optimizer"), measured(3, "adamw", "all")]
    results += [norms(stage, "adamw") for stage in range(4)] + [norms(0, "muon"), norms(1, "muon")]
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as out:
            json.dump(results, out)


if __name__ == "__main__":
    with process_group():
        main()
