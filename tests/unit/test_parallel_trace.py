"""What a trace says was sent and computed."""

from typing import Any

import pytest

from benchmarks.parallel.trace import busy_seconds, sent_bytes


def operation(name: str, kinds: list[Any], shapes: list[Any]) -> dict[str, Any]:
    return {"name": f"c10d::{name}", "args": {"Input type": kinds, "Input Dims": shapes}}


def test_a_ring_sends_its_share_of_each_operation() -> None:
    reduced = operation("allreduce_", ["TensorList", "", ""], [[[10, 10]], [], []])
    assert sent_bytes([reduced], 4) == 2 * 3 / 4 * 400
    gathered = operation("_allgather_base_", ["float", "float", ""], [[400], [100], []])
    assert sent_bytes([gathered], 4) == 3 / 4 * 1600
    sent = operation("send", ["TensorList", "", ""], [[[8], [2, 2]], [], []])
    assert sent_bytes([sent], 4) == 48
    assert sent_bytes([operation("recv_", ["TensorList"], [[[8]]]), {"name": "aten::add"}], 4) == 0
    assert sent_bytes([reduced], 1) == 0


def test_what_nccl_says_of_itself_comes_first() -> None:
    def said(name: str, kind: str, given: int, made: int) -> dict[str, Any]:
        args = {"Collective name": name, "dtype": kind, "In msg nelems": given, "Out msg nelems": made, "Group size": 2}
        return {"name": "record_param_comms", "args": args}

    events = [said("send", "BFloat16", 100, 100), said("recv", "BFloat16", 100, 100), said("wait", "Byte", 0, 0)]
    assert sent_bytes([*events, operation("send", ["TensorList"], [[[100]]])], 4) == 200
    assert sent_bytes([said("_allgather_base", "BFloat16", 50, 100)], 4) == 100
    assert sent_bytes([said("allreduce", "Float", 100, 100)], 4) == 400
    assert sent_bytes([said("_reduce_scatter_base", "Float", 100, 50)], 4) == 200


def test_the_gpu_is_busy_where_any_kernel_but_nccls_runs() -> None:
    def span(name: str, start: float, length: float, kind: str = "kernel") -> dict[str, Any]:
        return {"name": name, "cat": kind, "ts": start, "dur": length}

    events = [
        span("gemm", 0, 10),
        span("add", 5, 10),
        span("nccl_AllReduce", 0, 100),
        span("Memcpy", 50, 5, "gpu_memcpy"),
    ]
    assert busy_seconds([*events, span("aten::mm", 0, 1000, "cpu_op")]) == pytest.approx(20e-6)
