"""Slices of Cloud TPU, with a fake gcloud."""

import os
import pty
import re
import subprocess

import pytest
from fake_cluster import NOT_FOUND, Reply

STATE = "--format=value(state.state)"
WORKERS = "worker.sh state"
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
HERE = ["a-run", "--project=a-project", "--zone=us-west4-a"]
CREATE = [
    *QUEUE,
    "create",
    *HERE,
    "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite",
    "--node-id=a-run",
    "--valid-until-duration=PT120M",
    "--spot",
    "--scopes=https://www.googleapis.com/auth/cloud-platform",
    "--quiet",
]
QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 8 in zone us-west4-a.\n"
)
REMAKE = ["delete", "create", "scp", "ssh start"]


@pytest.fixture
def tpu(cluster):
    cluster.answers("buckets describe", "True")
    return cluster


def on_workers(*words):
    return "".join(f"peftjax-state={word} host-{number}\n" for number, word in enumerate(words))


def test_create_asks_for_a_slice_and_waits_until_it_is_active(tpu):
    tpu.answers(STATE, NOT_FOUND, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = tpu("create")
    assert done.returncode == 0, done.stderr
    assert [call for call in tpu.calls if "create" in call] == [CREATE]
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING"):
        assert re.search(f"^a-run: {state}, 0 min [0-9]+ s$", done.stderr, re.MULTILINE)
    assert "start.sh" in done.stderr


def test_create_of_several_reserved_slices(tpu):
    tpu.settings |= {"SLICES": "3", "SPOT": "no", "RESERVED": "yes", "NETWORK": "a-network"}
    tpu.settings |= {"SERVICE_ACCOUNT": "me@example.com", "CREATE_FLAGS": "('--labels=a=b c')"}
    tpu.answers(STATE, NOT_FOUND, "ACTIVE")
    assert tpu("create").returncode == 0
    (call,) = [call for call in tpu.calls if "create" in call]
    assert {"--node-count=3", "--node-prefix=a-run", "--reserved", "--network=a-network"} <= set(call)
    assert {"--service-account=me@example.com", "--labels=a=b c"} <= set(call)
    assert not {"--spot", "--node-id=a-run"} & set(call)


def test_create_takes_what_is_there(tpu):
    tpu.answers(STATE, "ACTIVE")
    assert tpu("create").returncode == 0
    assert tpu.done == []


def test_a_quota_that_is_used_up_is_named_with_the_remedy(tpu):
    tpu.answers(STATE, NOT_FOUND)
    tpu.answers("create", Reply(err=QUOTA, code=1))
    done = tpu("create")
    assert done.returncode == 1
    assert QUOTA in done.stderr
    assert "quota does not allow 1 x v5litepod-16 in us-west4-a: ask for more" in done.stderr
    assert "Nothing is left behind." in done.stderr


def test_a_zone_without_capacity_leaves_a_request_that_is_named(tpu):
    tpu.answers(STATE, NOT_FOUND, "WAITING_FOR_RESOURCES", "FAILED")
    tpu.answers("failedData", 'There is no more capacity in the zone "us-west4-a"')
    done = tpu("create")
    assert done.returncode == 1
    assert "is FAILED: There is no more capacity" in done.stderr
    assert "choose another ZONE" in done.stderr
    assert (
        "Still there, and perhaps paid for: the queued resource a-run in us-west4-a (FAILED)" in done.stderr
    )
    assert "delete.sh' --settings" in done.stderr


def test_waiting_has_an_end(tpu):
    tpu.settings["WAIT_MINUTES"] = "0"
    tpu.answers(STATE, NOT_FOUND, "WAITING_FOR_RESOURCES")
    done = tpu("create")
    assert done.returncode == 1
    assert "a-run is still WAITING_FOR_RESOURCES after WAIT_MINUTES=0" in done.stderr


def test_a_bucket_in_which_checkpoints_cannot_be_renamed_is_refused(cluster):
    cluster.answers("buckets describe", "False")
    done = cluster("create")
    assert done.returncode == 1
    assert "BUCKET_PATH" in done.stderr
    assert "--enable-hierarchical-namespace" in done.stderr
    assert cluster.done == []


def test_start_copies_and_starts_what_the_settings_say(tpu):
    words = ["--data", "/bucket/my data.jsonl", "--method-options", 'a="$HOME"', "it's"]
    tpu.settings["TRAIN_ARGS"] = "(--data '/bucket/my data.jsonl' --method-options 'a=\"$HOME\"' \"it's\")"
    tpu.settings["ENVIRONMENT"] = "('XLA_FLAGS=--a=1 --b=2')"
    tpu.answers(STATE, "ACTIVE")
    tpu.answers(WORKERS, on_workers("ready", "ready"))
    done = tpu("start")
    assert done.returncode == 0, done.stderr
    scp, start = (call for call in tpu.calls if "scp" in call or any("start" in word for word in call))
    everywhere = ["--worker=all", "--node=all"]
    assert scp == [*QUEUE, "scp", str(tpu.launch), "a-run:", *HERE[1:], "--recurse", *everywhere, "--quiet"]
    assert start == [
        *QUEUE,
        "ssh",
        *HERE,
        *everywhere,
        "--command=bash peftjax-launch/worker.sh start",
        "--quiet",
    ]
    assert tpu.job("COMMAND") == ["train", "--distributed", *words, "--output", "/bucket/runs/a-run/output"]
    assert tpu.job("ENVIRONMENT") == ["XLA_FLAGS=--a=1 --b=2"]
    assert tpu.job("BUCKET") == ["a-bucket"]
    packed = subprocess.check_output(["tar", "tzf", tpu.launch / "peftjax.tar.gz"], text=True).splitlines()
    assert {"check out/pyproject.toml", "check out/peftjax/code.py"} <= set(packed)


@pytest.mark.parametrize(
    ("package", "requirement"),
    [
        ("'peftjax[train] @ git+https://x/y@main'", "peftjax[train] @ git+https://x/y@main"),
        ("a.whl", "file:a.whl"),
    ],
)
def test_what_is_installed(tpu, package, requirement):
    (tpu.folder / "a.whl").write_text("a wheel")
    tpu.settings["PACKAGE"] = package
    tpu.answers(STATE, "ACTIVE")
    tpu.answers(WORKERS, on_workers("ready"))
    assert tpu("start", cwd=tpu.folder).returncode == 0
    assert tpu.job("REQUIREMENT") == [requirement]
    assert (tpu.launch / "a.whl").exists() == (package == "a.whl")


def test_start_leaves_a_training_alone(tpu):
    tpu.answers(STATE, "ACTIVE")
    tpu.answers(WORKERS, on_workers("running", "running"))
    done = tpu("start")
    assert done.returncode == 1
    assert "is running already" in done.stderr
    assert tpu.done == []


def test_a_start_that_fails_says_what_is_left(tpu):
    tpu.answers(STATE, "ACTIVE")
    tpu.answers(WORKERS, on_workers("ready"))
    tpu.answers("scp", Reply(err="Permission denied (publickey)\n", code=255))
    done = tpu("start")
    assert done.returncode == 1
    assert "copying to the workers failed" in done.stderr
    assert "Still there, and perhaps paid for: the queued resource a-run" in done.stderr


def test_follow_shows_the_log_of_the_first_worker(tpu):
    tpu.answers(STATE, "ACTIVE")
    tpu.answers("worker.sh follow", "step 1\nstep 2")
    done = tpu("follow")
    assert done.stdout == "step 1\nstep 2\n"
    assert {"--worker=0", "--node=0"} <= set(tpu.calls[-1])


def test_follow_of_a_lost_slice_says_where_the_log_is(tpu):
    tpu.answers(STATE, "SUSPENDED")
    done = tpu("follow")
    assert done.returncode == 1
    assert "gs://a-bucket/runs/a-run/logs/" in done.stderr


@pytest.mark.parametrize(
    ("workers", "state"),
    [
        (["running", "running"], "running"),
        (["finished", "running"], "running"),
        (["finished", "finished"], "finished"),
        (["running", "failed"], "failed"),
        (["running", "ready"], "failed"),
        (["failed", "refused"], "refused"),
    ],
)
def test_status_is_that_of_the_worst_worker(tpu, workers, state):
    tpu.answers(STATE, "ACTIVE")
    tpu.answers(WORKERS, on_workers(*workers))
    assert tpu("status").stdout == f"a-run: {state}\n"


@pytest.mark.parametrize(
    ("queue", "workers", "done"),
    [
        (["SUSPENDED", "SUSPENDED", NOT_FOUND, NOT_FOUND, "ACTIVE"], "", REMAKE),
        (["SUSPENDING", "SUSPENDING", "SUSPENDED", NOT_FOUND, NOT_FOUND, "ACTIVE"], "", REMAKE),
        (["DELETING", "DELETING", NOT_FOUND, NOT_FOUND, "ACTIVE"], "", REMAKE[1:]),
        ([NOT_FOUND, NOT_FOUND, "ACTIVE"], "", REMAKE[1:]),
        (["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], "", REMAKE[2:]),
        (["ACTIVE"], on_workers("running", "running"), []),
        (["ACTIVE"], on_workers("finished"), []),
        (["ACTIVE"], on_workers("failed", "running"), ["ssh stop", "scp", "ssh start"]),
    ],
)
def test_resume_does_what_the_state_asks_for(tpu, queue, workers, done):
    tpu.answers(STATE, *queue)
    tpu.answers(WORKERS, workers)
    finished = tpu("resume")
    assert finished.returncode == 0, finished.stderr
    assert tpu.done == done


def test_resume_changes_nothing_when_nobody_says_how_it_is(tpu):
    tpu.answers(STATE, Reply(err="ERROR: deadline exceeded\n", code=1))
    done = tpu("resume")
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    assert tpu.done == []


def test_run_goes_on_after_a_preemption_and_a_lost_node_until_it_is_finished(tpu):
    tpu.answers(
        STATE,
        *(NOT_FOUND, NOT_FOUND, "PROVISIONING", "ACTIVE"),  # made
        *("ACTIVE", "ACTIVE"),  # trains
        *("SUSPENDING", "SUSPENDED", "SUSPENDED", NOT_FOUND, NOT_FOUND, "ACTIVE"),  # taken away, made anew
        "ACTIVE",  # trains
        *("ACTIVE", "ACTIVE", "ACTIVE", NOT_FOUND, NOT_FOUND, "ACTIVE"),  # a node is gone: made anew
        *("ACTIVE", "ACTIVE", "ACTIVE", NOT_FOUND),  # trains, has finished, is deleted
    )
    running, gone = on_workers("running", "running"), Reply(err="ssh: connect: timed out\n", code=255)
    tpu.answers(WORKERS, running, running, running, gone, gone, running, on_workers("finished", "finished"))
    tpu.answers("tpu-vm describe", "PREEMPTED")
    done = tpu("run")
    assert done.returncode == 0, done.stderr
    assert tpu.done == ["create", "scp", "ssh start", *REMAKE, *REMAKE, "delete"]
    assert "resume 2 of at most 20" in done.stderr
    assert "node a-run is PREEMPTED" in done.stderr
    assert all(tpu.calls[at] == CREATE for at, call in enumerate(tpu.calls) if "create" in call)


def test_run_gives_up_after_so_many_resumes_and_deletes(tpu):
    tpu.settings["MAX_RESUMES"] = "2"
    tpu.answers(STATE, *["ACTIVE"] * 9, NOT_FOUND)
    tpu.answers(WORKERS, on_workers("ready"), on_workers("failed"))
    done = tpu("run")
    assert done.returncode == 1
    assert "a-run is failed" in done.stderr
    assert "after MAX_RESUMES=2 resumes" in done.stderr
    assert tpu.done == ["ssh stop", "scp", "ssh start"] * 3 + ["delete"]
    assert "Nothing is left behind." in done.stderr


@pytest.mark.parametrize("policy", ["always", "success"])
def test_run_does_not_try_again_what_was_refused(tpu, policy):
    tpu.settings["DELETE_AFTER_RUN"] = policy
    deleted = policy == "always"
    tpu.answers(STATE, *["ACTIVE"] * 3, *([NOT_FOUND] if deleted else []))
    tpu.answers(WORKERS, on_workers("ready"), on_workers("refused"))
    done = tpu("run")
    assert done.returncode == 1
    assert "cannot use these options" in done.stderr
    assert tpu.done == ["ssh stop", "scp", "ssh start"] + ["delete"] * deleted
    assert ("Nothing is left behind." if deleted else "Still there, and perhaps paid for") in done.stderr


def test_run_waits_out_answers_that_fail(tpu):
    tpu.answers(STATE, "ACTIVE", Reply(err="ERROR: 503\n", code=1), "ACTIVE", "ACTIVE", NOT_FOUND)
    tpu.answers(WORKERS, on_workers("running"), on_workers("finished"))
    done = tpu("run")
    assert done.returncode == 0, done.stderr
    assert tpu.done == ["delete"]


def test_run_leaves_alone_what_it_cannot_see(tpu):
    tpu.answers(STATE, "ACTIVE", Reply(err="ERROR: 503\n", code=1))
    tpu.answers(WORKERS, on_workers("running"))
    done = tpu("run")
    assert done.returncode == 1
    assert "could not be seen in 20 looks" in done.stderr
    assert "the queued resource a-run in us-west4-a (unknown)" in done.stderr
    assert tpu.done == []


def test_run_ends_when_somebody_deletes_the_slice(tpu):
    tpu.answers(STATE, "ACTIVE", "DELETING", "DELETING", NOT_FOUND)
    tpu.answers(WORKERS, on_workers("running"))
    done = tpu("run")
    assert done.returncode == 1
    assert "a-run is there no more: somebody deleted it" in done.stderr
    assert tpu.done == []


def test_an_interrupted_run_says_what_goes_on(tpu):
    tpu.settings["POLL_SECONDS"] = "60"
    tpu.answers(STATE, "ACTIVE")
    tpu.answers(WORKERS, on_workers("running"))
    (tpu.folder / "fakes" / "bin" / "sleep").write_text("#!/usr/bin/env bash\nkill -INT $PPID\n")
    (tpu.folder / "fakes" / "bin" / "sleep").chmod(0o755)
    done = tpu("run")
    assert done.returncode == 130
    assert "Still there, and perhaps paid for: the queued resource a-run" in done.stderr
    assert tpu.done == []


def test_a_program_that_is_not_there(tpu):
    tpu.settings["BACKEND"] = "slurm"
    (tpu.folder / "fakes" / "bin" / "squeue").unlink()
    done = tpu("delete", "--yes")
    assert done.returncode == 1
    assert "delete.sh: squeue is not on this machine's PATH: install it" in done.stderr


def test_delete_is_told_yes_and_can_be_repeated(tpu):
    tpu.answers(STATE, "ACTIVE", "ACTIVE", "ACTIVE", NOT_FOUND)
    assert tpu("delete").returncode == 1  # it asks, and nobody is there
    assert tpu.done == []
    first, second = tpu("delete", "--yes"), tpu("delete", "--yes")
    assert (first.returncode, second.returncode) == (0, 0)
    assert [call for call in tpu.calls if "delete" in call] == [
        [*QUEUE, "delete", *HERE, "--force", "--quiet"]
    ]
    assert "there is nothing of a-run to delete" in second.stderr


@pytest.mark.parametrize(("answer", "deleted"), [("y", ["delete"]), ("", [])])
def test_delete_asks(tpu, answer, deleted):
    tpu.answers(STATE, "ACTIVE", "ACTIVE", NOT_FOUND)
    terminal, stdin = pty.openpty()
    os.write(terminal, f"{answer}\n".encode())
    done = tpu("delete", stdin=stdin)
    assert "Delete the queued resource a-run in us-west4-a (ACTIVE)?" in done.stderr
    assert tpu.done == deleted


def test_a_deletion_that_fails_is_said(tpu):
    tpu.answers(STATE, "ACTIVE")
    tpu.answers("delete", Reply(err="ERROR: PERMISSION_DENIED\n", code=1))
    done = tpu("delete", "--yes")
    assert done.returncode == 1
    assert "deleting a-run failed: the account in use may not do this" in done.stderr
