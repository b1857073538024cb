"""Compiled code is code that is run: it lies where nobody else can write."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dbtrain.training.compilation import CACHE, keep_compiled_code, private_folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(CACHE, raising=False)
    return tmp_path / "cache" / "dbtrain" / "compiled"


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_compiled_code_lies_in_the_users_cache_and_is_nobody_elses(cache):
    keep_compiled_code()
    assert os.environ[CACHE] == str(cache) and mode(cache) == 0o700


def test_a_folder_that_others_could_write_is_closed(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert private_folder() == cache and mode(cache) == 0o700


def test_who_chose_a_folder_keeps_it(monkeypatch):
    monkeypatch.setenv(CACHE, "/chosen")
    keep_compiled_code()
    assert os.environ[CACHE] == "/chosen"


def test_a_link_to_elsewhere_is_not_followed(cache, tmp_path):
    cache.parent.mkdir(parents=True)
    cache.symlink_to(tmp_path)
    assert private_folder() is None


@pytest.mark.parametrize("what", ["a file is there", "another user owns it"])
def test_where_there_can_be_no_such_folder_the_process_has_one_of_its_own(cache, what, tmp_path, monkeypatch):
    if what == "a file is there":
        cache.parent.mkdir(parents=True)
        cache.write_text("")
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    script = "import os; from dbtrain.training import compilation as c\n"
    script += "" if what == "a file is there" else "os.getuid = lambda: 4_000_000\n"
    script += "c.keep_compiled_code(); f = os.environ[c.CACHE]; print(f, oct(os.stat(f).st_mode & 0o777))"
    environment = {**os.environ, "TMPDIR": str(temporary)}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    folder, permissions = told.stdout.split()
    assert Path(folder).parent == temporary and permissions == "0o700"
    assert not Path(folder).exists()  # it went with the process
