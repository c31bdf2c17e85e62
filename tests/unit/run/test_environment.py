"""environment.json: command, versions, machine, hours."""

import json
import sys

import numpy as np
import torch

import run.environment
from run.environment import commit, write_environment


def test_the_environment_names_command_versions_and_machine(tmp_path):
    write_environment(tmp_path, torch.device("cpu"), 1.25)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.partition("+")[0] and sys.executable in environment["command"]
    assert environment["device"] == "cpu" and environment["cores"] >= 1 and environment["cpu"]
    assert environment["hours_trained"] == 1.25


def test_a_copy_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(run.environment, "ROOT", tmp_path)
    commit.cache_clear()
    assert commit() is None
    commit.cache_clear()


def test_a_disk_that_refuses_is_no_error(tmp_path):
    write_environment(tmp_path / "gone", torch.device("cpu"), 0)


def test_a_package_that_is_not_installed_has_no_version(tmp_path, monkeypatch):
    monkeypatch.setattr(run.environment, "PACKAGES", ("numpy", "not-installed"))
    write_environment(tmp_path, torch.device("cpu"), 0)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["numpy"] == np.__version__ and environment["not-installed"] is None
