"""Settled runs of a small ViT on digits, whose blocks are committed with weights of their own, without training."""

import torch

from dbtrain.config import load_config
from dbtrain.method.split import global_name
from dbtrain.run.prepare import prepare
from dbtrain.run.run import Run
from dbtrain.shards.checkpoint import Checkpoints
from dbtrain.shards.manifest import read_manifest
from dbtrain.shards.storage.store import Store

BASE = {
    "name": "toy",
    "blocks": 2,
    "model": {"arch": "vit", "depth": 3, "dim": 12, "heads": 2, "patch": 4},
    "data": {"source": "digits"},
    "codebook": {"dim": 11},
    "noise": {"ranges": "uniform", "sigma_min": 0.5, "sigma_max": 20.0},
    "training": {"steps": 2, "batch_size": 8, "ema": 0.0},
}


def never(*_):
    raise AssertionError("nothing here needs a calibration")


def commit(run, seed=0, blocks=(0, 1), holds=lambda block, name: True):
    """Blocks with weights of their own, committed at the last step: of those names that `holds` says."""
    manifest = read_manifest(run)
    run_plan = Run(run).plan
    for block in blocks:
        generator = torch.Generator().manual_seed(10 * seed + block)
        state = {n: p.detach() for n, p in run_plan.model(block).named_parameters() if p.requires_grad}
        state = {name: tensor for name, tensor in state.items() if holds(block, name)}
        named = {global_name(block, n): t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
        checkpoints = Checkpoints(run.child("blocks", f"{block:02d}"), manifest.identity(block))
        checkpoints.commit(2, {"model": named}, loss=1.0, attempt=1, fence=lambda: None)


def settled(out, **changes):
    config = load_config(None, [f"out={out}"], base={**BASE, **changes})
    run = Store(config.run_url)
    run.makedirs()
    prepare(config, Run(run), never)
    return run
