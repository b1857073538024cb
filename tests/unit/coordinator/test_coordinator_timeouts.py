from rich.console import Console

from dbtrain.coordinator.timeouts import timeouts, timeouts_table
from tests.conftest import ROOT


def shown(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_shows_what_is_in_force(monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "77")
    text = shown(timeouts_table(123.0, local=True))
    assert "123" in text and "cluster.hang_timeout_s" in text
    assert "77" in text and "RAY_gcs_rpc_server_reconnect_timeout_s" in text


def test_an_object_store_is_asked_less_often_than_a_disk():
    here, there = ({row.what: row.seconds for row in timeouts(600.0, local)} for local in (True, False))
    assert here["the command asks to stop"] < there["the command asks to stop"]
    assert set(here) == set(there) and all(seconds > 0 for seconds in here.values())


def test_the_documents_list_every_time_out_with_its_value(monkeypatch):
    monkeypatch.delenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", raising=False)
    lines = (ROOT / "docs" / "operations.md").read_text().splitlines()
    for row in timeouts(600.0, local=True):
        assert any(row.what in line and f"| {row.seconds:g} |" in line and row.then in line for line in lines), row
