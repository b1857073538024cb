"""NCCL between two hosts: one block of two workers, each on a host of its own with one GPU; one host loses power.

For a machine with two GPUs; run as root: ``python -m tests.cluster.two_gpu_hosts FOLDER [DEVICE [STAGE...]]`` (the
device ``cpu`` rehearses it over gloo). The hosts are network namespaces with names of their own, so that NCCL takes
them for machines and talks over TCP. Under each ZeRO stage, 1 and 3 by default, the run goes on at a spare host, and
is compared bit for bit with one on this machine that nothing happened to: a sum of two has no order.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbtrain.coordinator.ray.settings import SETTINGS
from tests.cluster.hosts import GCS_PORT, Network, Program

HEAD, FIRST, SECONDS = "head", "ada", ("bob", "cyd", "dan")
GPU_OF = {FIRST: "0", **dict.fromkeys(SECONDS, "1")}
"""By host; those of the second GPU are there one after the other."""
STAGES = ("1", "3")
STEPS, LOST_AFTER = 120, 40
ROOT = Path(__file__).parents[2]
SHAPE = [
    *("blocks=1", "model.depth=2", "model.dim=33", "model.heads=3", "model.patch=4", "codebook.dim=17"),
    *("noise.ranges=uniform", "noise.sigma_min=0.5", "noise.sigma_max=20"),
    *(f"training.steps={STEPS}", "training.batch_size=18", "training.checkpoint_every=20", "training.log_every=5"),
    *("cluster.workers=2", "cluster.cpus_per_worker=0.5", "cluster.backoff_s=0.1"),
]
"""Widths that two workers cannot share evenly."""
SLOW = [{"block": 0, "step": step, "kind": "slow"} for step in range(LOST_AFTER + 1, LOST_AFTER + 9)]
"""Steps of three seconds, once each, so that a host is lost in the middle of the training."""
RUN_S = 300.0


def main(folder: Path, device: str = "cuda", *stages: str) -> None:
    """Run what the file says and print what came of it.

    Raises:
        AssertionError: a run failed, NCCL did not use the network, or a weight differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stages = stages or STAGES
    references = [reference(folder, device, stage) for stage in stages]
    environment = {name: os.environ[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= SETTINGS  # as on every node that a launcher starts: a lost host is found in 20 s and not in 64
    environment |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_SOCKET_IFNAME": "eth0"}
    environment |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/nccl-%h-%p.log"}
    with Network([HEAD, FIRST, *SECONDS], environment) as network:
        for name in (HEAD, FIRST, SECONDS[0]):
            start_ray(network, folder, name, device)
        for number, stage in enumerate(stages):
            command = train(network, folder, stage, device)
            lose(network, folder, stage, command, device, *SECONDS[number : number + 2])
            end(command)
        traffic = network.traffic.read()
        print("bytes from", FIRST, {name: traffic[FIRST, name] for name in SECONDS})
    assert [command.wait(RUN_S) for command in references] == [0] * len(stages), f"see {folder}/calm-*.log"
    report(folder, stages, nccl=device == "cuda")


def arguments(stage: str, device: str, out: Path) -> list[str]:
    """The command that trains the block."""
    config = str(ROOT / "configs" / "vit_digits.yaml")
    where = [f"name=zero{stage}", f"out={out}", f"training.zero_stage={stage}", f"cluster.device={device}"]
    return [sys.executable, "-m", "dbtrain", "train", config, *SHAPE, *where]


def reference(folder: Path, device: str, stage: str) -> "subprocess.Popen[bytes]":
    """Start the run that nothing happens to, on this machine alone."""
    with (folder / f"calm-{stage}.log").open("wb") as log:
        return subprocess.Popen(arguments(stage, device, folder / "calm"), cwd=folder, stdout=log, stderr=log)


def start_ray(network: Network, folder: Path, name: str, device: str) -> None:
    """Start Ray on a host, with its GPU if it has one."""
    gpus = int(device == "cuda" and name in GPU_OF)
    gpu = {"CUDA_VISIBLE_DEVICES": GPU_OF.get(name, "")}
    program = network.start_ray(name, 4, HEAD, folder / f"ray-{name}.log", gpus=gpus, **gpu)
    assert program.wait(300) == 0, program.output()


def train(network: Network, folder: Path, stage: str, device: str) -> Program:
    """Start the command in the network."""
    return network.start(
        HEAD,
        [*arguments(stage, device, folder / "lost"), f"cluster.address={network.addresses[HEAD]}:{GCS_PORT}"],
        folder / f"lost-{stage}.log",
        DBTRAIN_FAULTS=json.dumps(SLOW),
        NO_COLOR="1",
        COLUMNS="200",
    )


def end(command: Program) -> None:
    """Wait for a command that must succeed."""
    started = time.monotonic()
    assert command.wait(RUN_S) == 0, command.output()[-4000:]
    print(f"{command.log.stem}: {time.monotonic() - started:.0f} s", flush=True)


def lose(network: Network, folder: Path, stage: str, command: Program, device: str, lost: str, spare: str) -> None:
    """Cut the second host off and take its power, once the run has committed; then bring a spare one."""
    until = time.monotonic() + RUN_S
    while committed(folder / "lost" / f"zero{stage}") < LOST_AFTER:
        assert time.monotonic() < until and not command.over, command.output()[-4000:]
        time.sleep(0.2)
    network.plug(lost, False)
    network.hosts[lost].power_off()
    start_ray(network, folder, spare, device)


def committed(run: Path) -> int:
    """Newest step whose commit the first worker has told."""
    return max((e["step"] for e in events(run) if e["event"] == "commit"), default=0)


def events(run: Path) -> list[dict[str, Any]]:
    """Events of all attempts of the block."""
    paths = sorted(run.glob("blocks/00/attempts/*/events.jsonl"))
    whole = [path.read_text().rpartition("\n")[0] for path in paths]  # the last line may be being written
    return [json.loads(line) for text in whole for line in text.splitlines()]


def report(folder: Path, stages: Sequence[str], nccl: bool) -> None:
    """Compare the runs, and show that NCCL went over the network."""
    for stage in stages:
        lines = events(folder / "lost" / f"zero{stage}")
        starts = [e for e in lines if e["event"] == "start"]
        resumed = [e["step"] for e in lines if e["event"] == "resumed"]
        shards = sorted((folder / "calm" / f"zero{stage}").glob(f"blocks/00/step_{STEPS:08d}/*.safetensors"))
        assert len(shards) == 3, shards
        others = [folder / "lost" / path.relative_to(folder / "calm") for path in shards]
        same = all(a.read_bytes() == b.read_bytes() for a, b in zip(shards, others, strict=True))
        print(f"ZeRO {stage}: attempts {len(starts)}, resumed at {resumed}, bitwise equal: {same}")
        assert same and len(starts) == 2 and resumed
    if nccl:
        logs = [path.read_text(errors="replace") for path in folder.glob("nccl-*")]
        channels = {channel for log in logs for channel in re.findall(r"Channel .* via (\S+)", log)}
        print("NCCL's channels:", ", ".join(sorted(channels)))
        assert channels and all(channel.startswith("NET/Socket") for channel in channels), channels


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
