"""Copies of one sealed run in several places, whose blocks are committed with tensors of their own, untrained."""

import shutil

import torch

from dbtrain.method.split import global_name
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.storage.store import Store
from tests.unit.small_runs import settled

STEPS = 50


def sealed(folder, **changes):
    """A run of two blocks, three layers and odd sizes, 50 steps."""
    return Run(settled(folder, training={"steps": STEPS, "batch_size": 8, "ema": 0.9}, **changes))


def copied(run, folder):
    """The run's folder at another place."""
    shutil.copytree(run.store.path, folder / "toy")
    return Run(Store(folder / "toy"))


def parts(run, block, seed):
    """Tensors of all roles, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    state = run.plan.model(block).state_dict()
    model = {global_name(block, n): torch.randn(t.shape, generator=generator) for n, t in state.items()}
    optim = {f"{kind}/{name}": tensor * 0.5 for name, tensor in model.items() for kind in ("exp_avg", "exp_avg_sq")}
    return {"model": model, "ema": {name: tensor * 0.9 for name, tensor in model.items()}, "optim": optim}


def commit(run, block, step, seed=None, place="there-000001", attempt=1, loss=0.25):
    """Commit a block at a step; the same seed gives the same bits."""
    own = run.block(block)
    what = parts(run, block, step if seed is None else seed)
    checkpoints = Checkpoints(own.store, own.identity, held=own.schedule.held)
    return checkpoints.commit(step, what, loss=loss, attempt=attempt, fence=lambda: None, from_place=place)


def files(run):
    """Content of all checkpoints, by path."""
    root = run.store.path
    found = [path for path in sorted(root.glob("blocks/*/step_*/*")) if path.is_file()]
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


def steps(run):
    """Newest committed step of each block."""
    return [Run(run.store).block(block).committed for block in range(run.manifest.blocks)]
