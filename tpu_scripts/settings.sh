# The settings of a run on a cluster: the one file to edit. It is read by bash, so quote what has spaces.
# shellcheck shell=bash disable=SC2034

# ---- What runs -------------------------------------------------------------------------------------------

BACKEND=cloud-tpu # where: cloud-tpu (queued resources), gke (JobSet) or slurm (GPUs)
NAME=peftjax-run  # of the slice, the job and the folder in the bucket; small letters, digits, hyphens

# What `peftjax train` is given. The bucket is mounted at /bucket: put the model and the data there.
# (slurm: paths of the shared file system.) --output and the flags below are added.
TRAIN_ARGS=(
  --model /bucket/models/llama
  --data /bucket/data/chats.jsonl
  --method lora
  --rank 16
  --dtype bfloat16
)
DISTRIBUTED_ARGS=(--distributed) # how `peftjax train` is told to join the processes of all workers
ENVIRONMENT=()                   # variables for it, such as ("XLA_FLAGS=--xla_dump_to=/tmp/dump")

# What is installed: checkout (this folder's repository), a wheel, or a requirement that pip understands,
# such as "peftjax[train] @ git+https://example.com/peftjax@main".
PACKAGE=checkout
PYTHON_VERSION=3.12 # installed with uv where the workers have another

# ---- How long, and what happens at the end ---------------------------------------------------------------

WAIT_MINUTES=120        # for machines; a request that is older is dropped by Cloud TPU itself
POLL_SECONDS=30         # between two looks
MAX_RESUMES=20          # run.sh: how often it brings a lost run back; gke: JobSet's maxRestarts
DELETE_AFTER_RUN=always # run.sh: always, success or never. Machines that are kept are paid for.

# ---- Google Cloud: cloud-tpu and gke ---------------------------------------------------------------------

PROJECT=EDIT-ME-project              # the project's id
ZONE=EDIT-ME-zone                    # such as us-west4-a; the bucket should be in the same region
BUCKET_PATH=gs://EDIT-ME-bucket/run  # checkpoints and logs; needs a hierarchical namespace, see README.md
SLICES=1                             # more than 1: multi-slice
SPOT=yes                             # yes: cheaper, and may be taken away at any time
SERVICE_ACCOUNT=                     # cloud-tpu: email of the workers' account; empty: the project's default

# cloud-tpu
ACCELERATOR_TYPE=v5litepod-16        # `gcloud compute tpus accelerator-types list --zone=ZONE`
RUNTIME_VERSION=v2-alpha-tpuv5-lite  # `gcloud compute tpus versions list --zone=ZONE`
RESERVED=no                          # yes: from a reservation of the project (SPOT=no)
NETWORK=                             # empty: the project's network "default"
SUBNETWORK=                          # empty: that of the network in the zone's region
CREATE_FLAGS=()                      # further flags of `queued-resources create`
SSH_FLAGS=()                         # further flags of `queued-resources ssh` and `scp`, e.g. (--tunnel-through-iap)

# gke
GKE_CLUSTER=EDIT-ME-cluster          # has the Cloud Storage FUSE driver and JobSet
GKE_LOCATION=EDIT-ME-location        # region or zone of the cluster's control plane
GKE_ACCELERATOR=tpu-v5-lite-podslice # value of the label cloud.google.com/gke-tpu-accelerator
GKE_TOPOLOGY=4x4                     # chips of one slice
GKE_CHIPS_PER_NODE=4                 # google.com/tpu of one node
GKE_NODE_POOLS=create                # create: one pool a slice, made and deleted here; existing: there, or Autopilot
GKE_MACHINE_TYPE=ct5lp-hightpu-4t    # of the pools that are made
GKE_NAMESPACE=default                # of the JobSet
GKE_SERVICE_ACCOUNT=default          # Kubernetes account with access to the bucket (Workload Identity)
GKE_IMAGE=python:3.12                # has Python and pip, and git if PACKAGE needs it

# ---- SLURM -----------------------------------------------------------------------------------------------

SLURM_DIR=/EDIT-ME/shared/peftjax # on a file system that all nodes share: environment, log and checkpoints
SLURM_PARTITION=EDIT-ME-partition # `sinfo` lists them
SLURM_NODES=2                     # one process runs on each, with all its GPUs
SLURM_GPUS_PER_NODE=8             # of each node
SLURM_CPUS_PER_TASK=16            # cores of each node
SLURM_TIME=24:00:00               # run.sh submits what is not finished by then anew
SLURM_FLAGS=()                    # further flags of sbatch, such as (--account=physics --qos=low)
SLURM_SETUP=""                    # bash lines before installing and training, such as "module load cuda/13.0"
SLURM_JAX="jax[cuda13]"           # the requirement of JAX for these GPUs
