"""Where a cluster is looked for; what Ray would end the process for must be told before Ray is asked."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dbtrain.config import Config
from dbtrain.coordinator.ray import address
from dbtrain.coordinator.ray.address import check_address, connect
from dbtrain.coordinator.ray.settings import LOOPBACK, prepare
from dbtrain.coordinator.ray.train_internals import WHOLE, reason
from dbtrain.coordinator.train import train
from dbtrain.errors import ConfigError, PlacementError
from tests.unit.conftest import never


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray would leave an address; a machine without Ray."""
    monkeypatch.setattr(address, "nodes_here", list)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


@pytest.fixture
def closed() -> Iterator[str]:
    """An address where nothing listens, and nothing else will."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def open_(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address where something listens that says nothing."""
    monkeypatch.setattr(address, "ANSWER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_auto_with_the_address_of_a_cluster_that_is_gone(file: Path, closed: str) -> None:
    file.write_text(closed)
    before = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        connect("auto")
    assert time.monotonic() - before < 2
    told = str(caught.value)
    assert told.startswith(f"nothing answers at {closed}, which {file} names (cluster.address=auto)")
    assert "If that cluster has ended, name a cluster with --address host:port" in told


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad request\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_an_address_of_another_program_is_told_and_not_left_to_ray(answer: bytes) -> None:
    """Ray would end the process after 20 s, without a sentence of ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        at = f"127.0.0.1:{server.getsockname()[1]}"

        def answering() -> None:
            # the first connections only look whether anybody is there, and hang up
            while True:
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(answer)

        def until_closed() -> None:
            with suppress(OSError):
                answering()

        threading.Thread(target=until_closed, daemon=True).start()
        with pytest.raises(PlacementError, match=f"what answers at cluster.address={at} is not Ray: .* dashboard"):
            check_address(at)


def test_a_server_by_grpc_is_left_to_ray() -> None:
    grpc = pytest.importorskip("grpc")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert not address._is_something_else("127.0.0.1", port)
    finally:
        server.stop(None)


def test_a_traceback_in_what_ray_says_is_no_part_of_our_sentence() -> None:
    told = "Failed to connect to GCS. Last connection error: Traceback (most recent call last):\n  File x\nRpcError: no"
    assert reason(RuntimeError(told)) == "RuntimeError: Failed to connect to GCS. Last connection error: RpcError: no"
    assert "File x" in reason(RuntimeError(told), WHOLE)


def test_auto_where_no_ray_is(file: Path) -> None:
    for content in (None, ""):
        if content is not None:
            file.write_text(content)
        with pytest.raises(PlacementError, match=f"no Ray runs on this machine, nor is there a {file}: name a cluster"):
            check_address("auto")


def test_an_address_of_the_environment_goes_first(
    file: Path, open_: str, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(open_)
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(PlacementError, match=rf"nothing answers at RAY_ADDRESS={closed} .*Unset it"):
        check_address("auto")
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    with pytest.raises(ConfigError, match="RAY_ADDRESS=somewhere .* is no address"):
        check_address("auto")
    for unsaid in ("", "auto"):
        monkeypatch.setenv("RAY_ADDRESS", unsaid)
        check_address("auto")


def test_several_clusters_and_no_word_which(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "nodes_here", lambda: ["10.0.0.1:1", "10.0.0.1:2"])
    with pytest.raises(PlacementError, match="is one of 10.0.0.1:1, 10.0.0.1:2: name it"):
        check_address("auto")


@pytest.mark.parametrize("named", [None, "10.9.9.9:9"])
@pytest.mark.parametrize("nodes", [[], ["10.0.0.1:1"], ["10.0.0.1:1", "10.0.0.1:2"]], ids=len)
@pytest.mark.parametrize("given", [None, "10.8.8.8:8", "auto"])
def test_auto_is_what_ray_takes(
    file: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, nodes: list[str], given: str | None
) -> None:
    """Ray's own choice, which a new version may change."""
    from ray._private import services

    monkeypatch.setattr(services, "find_gcs_addresses", lambda: frozenset(nodes))
    monkeypatch.setattr(address, "nodes_here", lambda: nodes)
    if named:
        file.write_text(named)
    if given:
        monkeypatch.setenv("RAY_ADDRESS", given)
    try:
        ours = address._auto()[0]
    except PlacementError:
        # of several it would take any
        assert (len(nodes) > 1 and not named) or pytest.raises(ConnectionError, rays_choice)
    else:
        assert ours == rays_choice()


def rays_choice() -> str:
    from ray._private import services

    return str(services.get_ray_address_from_environment("auto", None))


@pytest.mark.parametrize("variables", [{}, {"TMPDIR": "/t"}, {"RAY_TMPDIR": "/r", "TMPDIR": "/t"}], ids=len)
def test_the_file_is_where_ray_leaves_it(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    from ray._common.utils import get_ray_address_file

    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(address.address_file()) == get_ray_address_file(None)


def test_the_nodes_of_this_machine_are_known_by_their_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(name: str, *line: str) -> Any:
        return SimpleNamespace(name=lambda: name, cmdline=lambda: list(line))

    processes = [
        process("raylet", "/x/raylet", "--gcs-address=10.0.0.1:1", "--agent=python a.py --gcs-address=10.0.0.1:1"),
        process("raylet", "/x/raylet --gcs-address=10.0.0.1:2"),
        process("grep", "grep", "--gcs-address=10.0.0.1:3"),
    ]
    monkeypatch.setattr(address.psutil, "process_iter", lambda: iter(processes))
    assert address.nodes_here() == ["10.0.0.1:1", "10.0.0.1:2"]


def test_a_cluster_for_this_machine_only_is_found_from_any_shell(open_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks another address than 127.0.0.1, and would end the process: launchers/local sets up one shell."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in LOOPBACK})
    monkeypatch.setattr(address, "_own_address", lambda: "127.0.0.2")
    port = open_.rpartition(":")[2]
    loopback = {given: check_address(given) for given in (open_, f"localhost:{port}", f"ray://{open_}")}
    assert list(loopback.values()) == [True, True, False]
    with socket.create_server(("127.0.0.2", int(port))):
        assert not check_address(open_)
    prepare(open_, loopback=True)
    assert os.environ.items() >= LOOPBACK.items() and "RAY_AUTH_TOKEN" not in os.environ


def test_a_run_is_refused_before_anything_is_made(
    make_config: Callable[..., Config], closed: str, tmp_path: Path
) -> None:
    config = make_config(f"cluster.address={closed}", "noise.ranges=calibrated")
    view: Any = SimpleNamespace(tell=never)
    with pytest.raises(PlacementError, match=f"nothing answers at cluster.address={closed}"):
        train(config, view, never)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_no_worker_could_train_is_refused_before_a_cluster_is_asked(
    make_config: Callable[..., Config], open_: str
) -> None:
    config = make_config(f"cluster.address={open_}", "training.micro_batch=3")
    view: Any = SimpleNamespace(tell=lambda line: None)
    with pytest.raises(ConfigError, match="micro_batch=3"):
        train(config, view, never)
