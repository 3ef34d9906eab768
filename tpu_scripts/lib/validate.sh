# Checks every setting before anything is asked or done; a sentence names the setting.
# shellcheck shell=bash

bad() { die "setting $1: $2 (in $SETTINGS)"; }

must_match() { # NAME PATTERN WHAT IT HAS TO BE
  local value=${!1-}
  [[ $value != *EDIT-ME* ]] || bad "$1" "'$value' is a placeholder; write $3"
  [[ $value =~ ^($2)$ ]] || bad "$1" "'$value' is not $3"
}

must_be_array() {
  [[ $(declare -p "$1" 2>/dev/null) == "declare -a"* ]] || bad "$1" "write it in brackets: $1=(...)"
}

check_settings() {
  local number='[0-9]{1,6}' count='[1-9][0-9]{0,5}' yes_no='yes|no' word='[A-Za-z0-9._-]+' arg name
  must_match BACKEND 'cloud-tpu|gke|slurm' "cloud-tpu, gke or slurm"
  must_match NAME '[a-z]([-a-z0-9]{0,28}[a-z0-9])?' "small letters, digits and hyphens, at most 30, a letter first"
  for name in TRAIN_ARGS DISTRIBUTED_ARGS ENVIRONMENT CREATE_FLAGS SSH_FLAGS SLURM_FLAGS; do
    must_be_array "$name"
  done
  for arg in "${TRAIN_ARGS[@]}"; do
    [[ $arg != --output && $arg != --output=* ]] ||
      bad TRAIN_ARGS "leave out --output: it is set to the run's folder in the bucket, where a resumed run looks"
    [[ $arg != *EDIT-ME* ]] || bad TRAIN_ARGS "'$arg' is a placeholder"
  done
  for arg in "${ENVIRONMENT[@]}"; do
    [[ $arg =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || bad ENVIRONMENT "'$arg' is not NAME=value"
  done
  [[ -n ${PACKAGE-} ]] || bad PACKAGE "is empty; write checkout, a wheel's path or a requirement"
  must_match PYTHON_VERSION '3\.1[1-9]' "3.11 or newer"
  must_match WAIT_MINUTES "$number" "a number of minutes"
  must_match POLL_SECONDS "$number" "a number of seconds"
  must_match MAX_RESUMES "$number" "a whole number"
  must_match DELETE_AFTER_RUN 'always|success|never' "always, success or never"
  case $BACKEND in
  cloud-tpu | gke)
    must_match PROJECT '[a-z0-9.:-]+' "the project's id"
    must_match ZONE '[a-z0-9-]+' "a zone, such as us-west4-a"
    must_match BUCKET_PATH 'gs://[a-z0-9][a-z0-9._-]+/[A-Za-z0-9._/-]+' "gs://BUCKET/FOLDER"
    must_match SLICES "$count" "a number of slices, at least 1"
    must_match SPOT "$yes_no" "yes or no"
    BUCKET=${BUCKET_PATH#gs://} BUCKET=${BUCKET%%/*}
    FOLDER=${BUCKET_PATH#gs://*/} FOLDER=${FOLDER%/}/$NAME
    RUN_DIR=/bucket/$FOLDER
    ;;&
  cloud-tpu)
    must_match ACCELERATOR_TYPE "$word" "a type such as v5litepod-16"
    must_match RUNTIME_VERSION "$word" "a version such as v2-alpha-tpuv5-lite"
    must_match RESERVED "$yes_no" "yes or no"
    [[ $SPOT$RESERVED != yesyes ]] || bad RESERVED "a reservation is not spot: choose SPOT=no or RESERVED=no"
    WANTED="$SLICES x $ACCELERATOR_TYPE" WHERE=$ZONE
    ;;
  gke)
    must_match GKE_CLUSTER '[a-z0-9-]+' "the cluster's name"
    must_match GKE_LOCATION '[a-z0-9-]+' "the cluster's region or zone"
    must_match GKE_ACCELERATOR '[a-z0-9-]+' "a label's value such as tpu-v5-lite-podslice"
    must_match GKE_TOPOLOGY '[0-9]+(x[0-9]+){1,2}' "a topology such as 4x4 or 2x2x4"
    must_match GKE_CHIPS_PER_NODE "$count" "a number of chips"
    must_match GKE_NODE_POOLS 'create|existing' "create or existing"
    must_match GKE_MACHINE_TYPE '[a-z0-9-]+' "a machine type such as ct5lp-hightpu-4t"
    must_match GKE_NAMESPACE '[a-z0-9-]+' "a namespace"
    must_match GKE_SERVICE_ACCOUNT '[a-z0-9.-]+' "the name of a Kubernetes service account"
    must_match GKE_IMAGE '[A-Za-z0-9._/:@-]+' "a container image"
    NODES_PER_SLICE=$((${GKE_TOPOLOGY//x/*}))
    ((NODES_PER_SLICE % GKE_CHIPS_PER_NODE == 0)) ||
      bad GKE_CHIPS_PER_NODE "$GKE_CHIPS_PER_NODE does not divide the $NODES_PER_SLICE chips of GKE_TOPOLOGY=$GKE_TOPOLOGY"
    NODES_PER_SLICE=$((NODES_PER_SLICE / GKE_CHIPS_PER_NODE))
    WANTED="$SLICES x $GKE_ACCELERATOR $GKE_TOPOLOGY" WHERE="cluster $GKE_CLUSTER"
    ;;
  slurm)
    must_match SLURM_DIR '/[^'\''"$`\\]+' "a folder's full path, without quotes and dollar signs"
    must_match SLURM_PARTITION "$word" "a partition's name"
    must_match SLURM_NODES "$count" "a number of nodes"
    must_match SLURM_GPUS_PER_NODE "$count" "a number of GPUs"
    must_match SLURM_CPUS_PER_TASK "$count" "a number of cores"
    must_match SLURM_TIME '([0-9]+-)?[0-9]+(:[0-9]+){0,2}' "a time such as 24:00:00 or 3-00:00:00"
    RUN_DIR=$SLURM_DIR/$NAME BUCKET=""
    WANTED="$SLURM_NODES nodes" WHERE="partition $SLURM_PARTITION"
    ;;
  esac
}
