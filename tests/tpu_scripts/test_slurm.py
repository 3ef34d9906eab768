"""Jobs of SLURM, with a fake sbatch, squeue, sacct, scancel and sinfo; and what the job's script does."""

import subprocess

import pytest
from fake_cluster import Reply

QUEUE = "squeue"


@pytest.fixture
def slurm(cluster):
    cluster.settings |= {"BACKEND": "slurm", "SLURM_GPUS_PER_NODE": "4", "SLURM_FLAGS": "(--account=physics)"}
    cluster.answers("sinfo", "gpus")
    cluster.answers("sbatch", "17;a-cluster")
    (folder(cluster)).mkdir(parents=True)
    return cluster


def folder(cluster):
    return cluster.folder / "shared disk" / "a-run"


def ended(cluster, code=None, job="17"):
    """What a job leaves that has run: its id, and its code if it reached its end."""
    (folder(cluster) / "job-id").write_text(f"{job}\n")
    if code is not None:
        (folder(cluster) / "exit-code").write_text(f"{code}\n")


def test_create_looks_whether_the_partition_is_there(slurm):
    assert slurm("create").returncode == 0
    assert slurm.calls == [["sinfo", "--noheader", "--partition=gpus", "--format=%P"]]


def test_a_partition_that_is_not_there(cluster):
    cluster.settings["BACKEND"] = "slurm"
    done = cluster("create")
    assert done.returncode == 1
    assert "setting SLURM_PARTITION: there is no partition gpus" in done.stderr


def test_start_installs_and_submits(slurm):
    slurm.settings["SLURM_SETUP"] = "'module() { export LOADED=\"$*\"; }; module load cuda'"
    done = slurm("start")
    assert done.returncode == 0, done.stderr
    assert slurm.calls[-1] == ["sbatch", "--parsable", f"{folder(slurm)}/launch/job.sbatch"]
    assert slurm.done == ["uv", "uv", "sbatch"]
    venv, pip = (call for call in slurm.calls if call[0] == "uv")
    assert venv[-1] == f"{folder(slurm)}/venv"
    assert pip[-2:] == [
        "jax[cuda13]",
        f"peftjax[train] @ file://{folder(slurm)}/launch/peftjax.tar.gz".replace("d d", "d%20d"),
    ]
    assert "job 17 is submitted" in done.stderr
    script = (folder(slurm) / "launch" / "job.sbatch").read_text()
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue", "--account=physics"} <= set(
        options
    )
    assert {f'--output="{folder(slurm)}/a-run.log"', "--open-mode=append", "--job-name=a-run"} <= set(options)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_job_runs_one_task_a_node_and_keeps_the_code_of_its_end(slurm, code):
    slurm("start")
    slurm.answers("srun", Reply(code=code))
    # The fake records its words only; a line before srun shows the variables that it would get.
    script = (folder(slurm) / "launch" / "job.sbatch").read_text().replace("code=0\n", "code=0\nenv\n")
    done = subprocess.run(["bash", "-c", script], env=slurm.environment, capture_output=True, text=True)
    assert done.returncode == code
    assert {"JAX_LOCAL_DEVICE_IDS=0,1,2,3", "SRUN_CPUS_PER_TASK=16"} <= set(done.stdout.splitlines())
    worker = f"{folder(slurm)}/launch/worker.sh"
    assert slurm.calls[-1] == ["srun", "--kill-on-bad-exit=1", "bash", worker, "train"]
    assert (folder(slurm) / "exit-code").read_text() == f"{code}\n"


def test_limits_of_the_account_are_named_with_the_remedy(cluster):
    cluster.settings["BACKEND"] = "slurm"
    error = (
        "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)\n"
    )
    cluster.answers("sbatch", Reply(err=error, code=1))
    done = cluster("start")
    assert done.returncode == 1
    assert "submitting a job of 2 nodes failed: the account's limits on partition gpus" in done.stderr
    assert "Nothing is left behind." in done.stderr


@pytest.mark.parametrize(
    ("queue", "left", "state"),
    [
        ("17 RUNNING None", {}, "running"),
        ("17 PENDING Resources", {}, "queued"),
        ("17 PENDING BeginTime", {"code": 1}, "queued"),  # back in the queue after a lost node
        ("", {"code": 0}, "finished"),
        ("", {"code": 2}, "refused"),
        ("", {"code": 1}, "failed"),
        ("", {}, "lost"),
        ("", None, "missing"),
        (Reply(err="slurm_load_jobs error: Unable to contact slurm controller\n", code=1), {}, "unknown"),
    ],
)
def test_status(slurm, queue, left, state):
    slurm.answers(QUEUE, queue)
    if left is not None:
        ended(slurm, **left)
    slurm.answers("sacct", "NODE_FAIL|node[1-2]")
    done = slurm("status")
    assert done.stdout == f"a-run: {state}\n"
    assert ("job 17 has ended: NODE_FAIL|node[1-2]" in done.stderr) == (state == "lost")


@pytest.mark.parametrize(
    ("queue", "left", "submitted"),
    [
        ("17 RUNNING None", {}, False),
        ("17 PENDING BeginTime", {}, False),
        ("", {"code": 0}, False),
        ("", {"code": 1}, True),
        ("", {}, True),
    ],
)
def test_resume_submits_what_is_not_in_the_queue_any_more(slurm, queue, left, submitted):
    slurm.answers(QUEUE, queue)
    ended(slurm, **left)
    done = slurm("resume")
    assert done.returncode == 0, done.stderr
    assert ("sbatch" in slurm.done) == submitted
    assert (folder(slurm) / "exit-code").exists() == (left == {"code": 0})


def test_run_submits_again_until_it_is_finished(slurm):
    slurm.answers(
        QUEUE, "", "17 RUNNING None", *[""] * 3, "18 RUNNING None", "18 PENDING BeginTime", "19 RUNNING None"
    )
    slurm.settings["MAX_RESUMES"] = "1"
    # It is lost once; then its node fails, SLURM puts it back, and it is finished.
    finish = f"echo 0 >'{folder(slurm)}/exit-code'"
    (slurm.folder / "fakes" / "bin" / "sleep").write_text(
        f'#!/bin/bash\ncase $(squeue --me) in *19*) {finish}; rm -r "$FAKES/rules/02" ;; esac\n'
    )
    (slurm.folder / "fakes" / "bin" / "sleep").chmod(0o755)
    done = slurm("run")
    assert done.returncode == 0, done.stderr
    assert slurm.done.count("sbatch") == 2
    assert "resume 1 of at most 1" in done.stderr


def test_follow_ends_with_the_job(slurm):
    (folder(slurm) / "a-run.log").write_text("step 1\nstep 2\n")
    slurm.answers(QUEUE, "17 RUNNING None", "")
    ended(slurm, code=0)
    assert slurm("follow").stdout == "step 1\nstep 2\n"


def test_delete_cancels_the_job_and_can_be_repeated(slurm):
    slurm.answers(QUEUE, "17 RUNNING None", "17 RUNNING None", "")
    ended(slurm)
    first, second = slurm("delete", "--yes"), slurm("delete", "--yes")
    assert (first.returncode, second.returncode) == (0, 0)
    assert [call for call in slurm.calls if call[0] == "scancel"] == [["scancel", "17"]]
    assert "there is nothing of a-run to delete" in second.stderr
    assert slurm("status").stdout == "a-run: missing\n"
