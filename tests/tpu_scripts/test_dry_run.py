"""`--dry-run` runs nothing, and prints what a run on the same answers does, word for word."""

import shlex

import pytest
from fake_cluster import NO_JOBSET, NOT_FOUND, TOOLS

FOUND = {  # for each backend and command: what the services answer where the dry run assumes it
    "cloud-tpu": {
        "create": [NOT_FOUND, "ACTIVE"],
        "start": ["ACTIVE"],
        "follow": ["ACTIVE"],
        "resume": ["SUSPENDED", "SUSPENDED", NOT_FOUND, NOT_FOUND, "ACTIVE"],
        "delete": ["ACTIVE", "ACTIVE", NOT_FOUND],
        "run": [NOT_FOUND, NOT_FOUND, "ACTIVE", "ACTIVE", "ACTIVE", NOT_FOUND],
    },
    "gke": {
        "create": [],
        "start": [NO_JOBSET],
        "follow": [],
        "resume": ["Failed "],
        "delete": ["Completed "],
        "run": [NO_JOBSET, "Completed "],
    },
    "slurm": {
        "create": [""],
        "start": [""],
        "resume": [""],
        "delete": ["1 RUNNING None"],
    },
}
ASKS = {"cloud-tpu": "value(state.state)", "gke": "terminalState", "slurm": "squeue"}


@pytest.mark.parametrize(("backend", "command"), [(b, c) for b, commands in FOUND.items() for c in commands])
def test_a_dry_run_prints_what_a_run_does(cluster, backend, command):
    cluster.settings |= {"BACKEND": backend, "SLICES": "2", "SSH_FLAGS": "('--ssh-flag=-o A=b')"}
    cluster.settings["SLURM_SETUP"] = "\"echo 'a b'; true\""
    dry = cluster(command, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert cluster.calls == []
    assert not (cluster.folder / "shared disk").exists()

    cluster.answers(ASKS[backend], *FOUND[backend][command])
    cluster.answers(
        "worker.sh state", *(["peftjax-state=finished"] if command == "run" else ["peftjax-state=ready"])
    )
    cluster.answers("buckets describe", "True")
    cluster.answers("sinfo", "gpus")
    cluster.answers("sbatch", "17")
    pools = "a-run-0\na-run-1"
    cluster.answers("node-pools list", *({"create": [""], "run": ["", pools]}.get(command, [pools])))
    real = cluster(command, "--yes")
    assert real.returncode == 0, real.stderr
    printed = [line.removeprefix("# asks: ") for line in dry.stdout.splitlines()]
    faked = [shlex.split(line) for line in printed if line.split()[0] in TOOLS]
    assert faked == [call for call in cluster.calls if call[0] != "uv"]
    assert faked
