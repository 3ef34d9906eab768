"""JobSets on GKE, with a fake kubectl and gcloud."""

import pytest
import yaml
from fake_cluster import NO_JOBSET, Reply

STATE = "terminalState"
POOLS = "node-pools list"
KUBECTL = ["kubectl", "--context=gke_a-project_us-west4_a-cluster", "--namespace=default"]
START = ["cp", "apply"]


@pytest.fixture
def gke(cluster):
    cluster.settings["BACKEND"] = "gke"
    cluster.answers("buckets describe", "True")
    return cluster


def made_of(calls, *words):
    return [call for call in calls if set(words) <= set(call)]


def test_create_makes_a_node_pool_for_each_slice(gke):
    gke.settings |= {"SLICES": "2", "GKE_TOPOLOGY": "4x8"}
    gke.answers(POOLS, "default-pool\na-run-0\na-run-01-of-another")  # the first is there already
    done = gke("create")
    assert done.returncode == 0, done.stderr
    (call,) = made_of(gke.calls, "create")
    assert call[:5] == ["gcloud", "container", "node-pools", "create", "a-run-1"]
    assert {"--cluster=a-cluster", "--location=us-west4", "--node-locations=us-west4-a", "--spot"} <= set(
        call
    )
    assert {"--machine-type=ct5lp-hightpu-4t", "--num-nodes=8", "--tpu-topology=4x8"} <= set(call)


def test_create_leaves_existing_pools_alone(gke):
    gke.settings["GKE_NODE_POOLS"] = "existing"
    assert gke("create").returncode == 0
    assert gke.done == []


def test_a_cluster_without_jobset_is_refused_with_the_remedy(gke):
    gke.answers("get crd", Reply(err='Error from server (NotFound): crd "jobsets" not found\n', code=1))
    done = gke("create")
    assert done.returncode == 1
    assert "has no JobSet; an administrator installs it: kubectl apply --server-side" in done.stderr


def test_a_quota_that_is_used_up_names_the_pools_that_were_made(gke):
    gke.settings["SLICES"] = "2"
    gke.answers(STATE, NO_JOBSET)
    gke.answers(
        "create a-run-1", Reply(err="ERROR: Insufficient regional quota: TPU_LITE_PODSLICE_V5\n", code=1)
    )
    gke.answers(POOLS, "", "a-run-0")
    done = gke("create")
    assert done.returncode == 1
    assert "quota does not allow 2 x tpu-v5-lite-podslice 4x4" in done.stderr
    assert "Still there, and perhaps paid for: the node pool a-run-0." in done.stderr


def test_start_copies_to_the_bucket_and_applies_a_jobset(gke):
    gke.settings |= {"SLICES": "2", "GKE_TOPOLOGY": "4x8", "MAX_RESUMES": "7"}
    gke.answers(STATE, NO_JOBSET)
    done = gke("start")
    assert done.returncode == 0, done.stderr
    files = [str(gke.launch / name) for name in ("worker.sh", "job.sh", "peftjax.tar.gz")]
    assert made_of(gke.calls, "cp") == [
        ["gcloud", "storage", "cp", *files, "gs://a-bucket/runs/a-run/launch/"]
    ]
    assert gke.calls[-1] == [*KUBECTL, "apply", f"--filename={gke.launch / 'jobset.yaml'}"]
    jobset = yaml.safe_load((gke.launch / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 8, 8, 0)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == ["bash", "/bucket/runs/a-run/launch/worker.sh", "install-and-train"]
    assert container["volumeMounts"][0]["mountPath"] == "/bucket"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "a-bucket"


def test_follow_shows_the_first_pod(gke):
    gke.answers("logs", "step 1")
    assert gke("follow").stdout == "step 1\n"
    assert {"--follow", "--container=train", "--tail=-1"} <= set(gke.calls[-1])
    assert "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" in gke.calls[-1][-1]


@pytest.mark.parametrize(
    ("jobset", "pods", "state"),
    [
        (" ", "Running Running", "running"),
        (" ", "Running Pending", "queued"),
        ("Completed ", "", "finished"),
        ("Failed ReachedMaxRestarts", "", "failed"),
        ("Failed FailJobSetFailurePolicyAction", "", "refused"),
        (NO_JOBSET, "", "missing"),
        (Reply(err="Unable to connect to the server\n", code=1), "", "unknown"),
    ],
)
def test_status(gke, jobset, pods, state):
    gke.answers(STATE, jobset)
    gke.answers("status.phase", pods)
    assert gke("status").stdout == f"a-run: {state}\n"


@pytest.mark.parametrize(
    ("jobset", "done"),
    [
        ("Failed ReachedMaxRestarts", ["delete", *START]),
        (NO_JOBSET, START),
        (" ", []),  # a lost pod is brought back by the JobSet controller
        ("Completed ", []),
    ],
)
def test_resume_does_what_the_state_asks_for(gke, jobset, done):
    gke.answers(STATE, jobset)
    gke.answers(POOLS, "a-run-0")
    finished = gke("resume")
    assert finished.returncode == 0, finished.stderr
    assert gke.done == done


def test_run_goes_on_after_restarts_are_used_up_until_it_is_finished(gke):
    failed = "Failed ReachedMaxRestarts"
    gke.answers(STATE, NO_JOBSET, " ", failed, failed, " ", "Completed ")
    gke.answers("status.phase", "Running", "Pending")
    gke.answers(POOLS, "", "a-run-0")
    done = gke("run")
    assert done.returncode == 0, done.stderr
    assert gke.done == ["create", *START, "delete", *START, "delete", "delete"]
    assert "resume 1 of at most 20" in done.stderr


def test_run_does_not_wait_for_nodes_for_ever(gke):
    gke.settings["WAIT_MINUTES"] = "0"
    gke.answers(STATE, NO_JOBSET, " ", " ", NO_JOBSET)
    gke.answers("status.phase", "Pending")
    gke.answers("FailedScheduling", "0/3 nodes are available: 3 Insufficient google.com/tpu.")
    gke.answers(POOLS, "", "a-run-0", "")
    done = gke("run")
    assert done.returncode == 1
    assert "Insufficient google.com/tpu" in done.stderr
    assert "no machines in WAIT_MINUTES=0" in done.stderr
    assert gke.done == ["create", *START, "delete", "delete"]


def test_delete_takes_the_jobset_and_its_pools_and_can_be_repeated(gke):
    gke.settings["SLICES"] = "2"
    gke.answers(STATE, " ", NO_JOBSET)
    gke.answers(POOLS, "a-run-0\na-run-1\nanother-0", "a-run-0\na-run-1\nanother-0", "another-0")
    first, second = gke("delete", "--yes"), gke("delete", "--yes")
    assert (first.returncode, second.returncode) == (0, 0)
    assert made_of(gke.calls, "delete", "jobset") == [
        [*KUBECTL, "delete", "jobset", "a-run", "--ignore-not-found"]
    ]
    assert [call[4] for call in made_of(gke.calls, "node-pools", "delete")] == ["a-run-0", "a-run-1"]
    assert "there is nothing of a-run to delete" in second.stderr
