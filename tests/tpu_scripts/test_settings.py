"""What the settings may be."""

import re
from itertools import pairwise

import pytest
from fake_cluster import ROOT


@pytest.mark.parametrize(
    ("backend", "name", "value", "sentence"),
    [
        ("nowhere", "NAME", "a-run", "setting BACKEND: 'nowhere' is not cloud-tpu, gke or slurm"),
        ("cloud-tpu", "NAME", "'My Run'", "setting NAME: 'My Run' is not small letters"),
        ("cloud-tpu", "PROJECT", "EDIT-ME-project", "setting PROJECT: 'EDIT-ME-project' is a placeholder"),
        (
            "cloud-tpu",
            "BUCKET_PATH",
            "gs://a-bucket",
            "setting BUCKET_PATH: 'gs://a-bucket' is not gs://BUCKET/FOLDER",
        ),
        ("cloud-tpu", "SLICES", "0", "setting SLICES: '0' is not a number of slices"),
        ("cloud-tpu", "SPOT", "true", "setting SPOT: 'true' is not yes or no"),
        ("cloud-tpu", "RESERVED", "yes", "setting RESERVED: a reservation is not spot"),
        ("cloud-tpu", "unset TRAIN_ARGS; TRAIN_ARGS", "--rank", "setting TRAIN_ARGS: write it in brackets"),
        ("cloud-tpu", "TRAIN_ARGS", "(--output here)", "setting TRAIN_ARGS: leave out --output"),
        ("cloud-tpu", "ENVIRONMENT", "('A B=1')", "setting ENVIRONMENT: 'A B=1' is not NAME=value"),
        ("cloud-tpu", "POLL_SECONDS", "often", "setting POLL_SECONDS: 'often' is not a number of seconds"),
        (
            "cloud-tpu",
            "DELETE_AFTER_RUN",
            "yes",
            "setting DELETE_AFTER_RUN: 'yes' is not always, success or never",
        ),
        ("cloud-tpu", "PYTHON_VERSION", "3.10", "setting PYTHON_VERSION: '3.10' is not 3.11 or newer"),
        ("gke", "GKE_CHIPS_PER_NODE", "5", "setting GKE_CHIPS_PER_NODE: 5 does not divide the 16 chips"),
        ("gke", "GKE_IMAGE", "'a image'", "setting GKE_IMAGE: 'a image' is not a container image"),
        ("slurm", "SLURM_DIR", "here", "setting SLURM_DIR: 'here' is not a folder's full path"),
        ("slurm", "SLURM_TIME", "long", "setting SLURM_TIME: 'long' is not a time"),
    ],
)
def test_a_setting_that_cannot_be_is_named_before_anything_is_asked(cluster, backend, name, value, sentence):
    cluster.settings |= {"BACKEND": backend, name: value}
    done = cluster("run")
    assert done.returncode == 1
    assert f"run.sh: {sentence}" in done.stderr
    assert "my settings.sh)" in done.stderr
    assert cluster.calls == []


def test_settings_that_bash_cannot_read(cluster):
    cluster.settings["NAME"] = "(("
    done = cluster("status")
    assert done.returncode == 1
    assert "cannot be read by bash" in done.stderr


def test_the_settings_as_they_come_are_refused_until_they_are_edited(cluster):
    cluster.settings.clear()
    done = cluster("create")
    assert done.returncode == 1
    assert "is a placeholder; write the project's id" in done.stderr


def test_an_option_that_is_not_there(cluster):
    done = cluster("delete", "--force")
    assert done.returncode == 1
    assert "there is no option '--force'; options: --dry-run" in done.stderr


def test_every_setting_has_a_comment_and_is_read():
    lines = (ROOT / "tpu_scripts" / "settings.sh").read_text().splitlines()
    code = "\n".join(file.read_text() for file in (ROOT / "tpu_scripts" / "lib").glob("*.sh"))
    for before, line in pairwise(lines):
        if (found := re.match(r"([A-Z_]+)=", line)) is not None:
            assert "#" in line or before.startswith("#"), line
            assert re.search(rf"\b{found[1]}\b", code), line
