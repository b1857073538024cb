"""What commands write where a person says never lies over the files of a run."""

import pytest

from dbtrain.errors import ConfigError
from dbtrain.shards.storage.output import check_output


def html(name):
    return name.endswith(".html")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "merged").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "link.html").symlink_to(tmp_path / "run" / "run.json")
    (tmp_path / "loop.html").symlink_to(tmp_path / "loop.html")
    return tmp_path


@pytest.mark.parametrize("name", ["run/run.json", "run/merged/model.safetensors", "run/merged/a.html", "link.html"])
def test_a_file_of_a_run_is_refused(run, name):
    with pytest.raises(ConfigError, match="lies among the files of the run"):
        check_output("--to", run / name, html)


@pytest.mark.parametrize("name", ["run/report.html", "run/second.html", "elsewhere.json", "none/there.html"])
def test_results_beside_a_run_and_elsewhere_are_not(run, name):
    check_output("--to", run / name, html)


def test_a_link_to_itself_is_told(run):
    with pytest.raises(ConfigError, match="leads nowhere"):
        check_output("--to", run / "loop.html", html)
