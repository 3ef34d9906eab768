# Google Kubernetes Engine: the training is a JobSet with one job a slice and one pod a node, which is
# started again by the JobSet controller when a pod or its node is lost.
# shellcheck shell=bash

# What is assumed with --dry-run, where nothing is asked.
case $COMMAND in
resume) DRY_JOBSET="Failed " ;;
*) DRY_JOBSET=missing ;;
esac

PODS=jobset.sigs.k8s.io/jobset-name=$NAME

kube() { KUBE=(kubectl "--context=gke_${PROJECT}_${GKE_LOCATION}_$GKE_CLUSTER" "--namespace=$GKE_NAMESPACE" "$@"); }

pool_command() { # VERB NUMBER FLAGS...
  POOL=(gcloud container node-pools "$1" "$NAME-$2" "--project=$PROJECT" "--cluster=$GKE_CLUSTER"
    "--location=$GKE_LOCATION" "${@:3}" --quiet)
}

# POOLS are the node pools of this run that exist; no answer is no pools but returns 1.
look_at_pools() {
  POOLS=()
  [[ $GKE_NODE_POOLS == create ]] || return 0
  local number assumed="" name
  if [[ $COMMAND == delete || $COMMAND == resume || -n ${DRY_POOLS-} ]]; then
    for ((number = 0; number < SLICES; number++)); do assumed+="$NAME-$number"$'\n'; done
  fi
  ask "$assumed" gcloud container node-pools list "--project=$PROJECT" "--cluster=$GKE_CLUSTER" \
    "--location=$GKE_LOCATION" "--format=value(name)" || return 1
  while read -r name; do
    [[ ! $name =~ ^$NAME-[0-9]+$ ]] || POOLS+=("${name##*-}")
  done <<<"$ANSWER"
}

backend_state() {
  kube get jobset "$NAME" "--output=jsonpath={.status.terminalState} {.status.conditions[?(@.type==\"Failed\")].reason}"
  if ! ask "$DRY_JOBSET" "${KUBE[@]}"; then
    STATE=unknown
    if not_found; then STATE=missing; else say "$ERRORS"; fi
    return
  fi
  case $ANSWER in
  missing) STATE=missing ;;
  Completed*) STATE=finished ;;
  Failed*FailJobSetFailurePolicyAction*) STATE=refused ;; # the rule on exit code 2, below
  Failed*) STATE=failed ;;
  *)
    kube get pods "--selector=$PODS" "--output=jsonpath={.items[*].status.phase}"
    ask Running "${KUBE[@]}" || ANSWER=""
    STATE=queued
    [[ $ANSWER != *Running* || $ANSWER == *Pending* ]] || STATE=running
    ;;
  esac
}

# kubectl's context of the cluster; a file of this machine is all that changes.
backend_connect() {
  need gcloud kubectl
  run_or_explain "getting the cluster's credentials" gcloud container clusters get-credentials "$GKE_CLUSTER" \
    "--project=$PROJECT" "--location=$GKE_LOCATION"
  MUTATED=no
}

backend_create() {
  check_bucket
  kube get crd jobsets.jobset.x-k8s.io --output=name
  ask jobset "${KUBE[@]}" || {
    not_found || die "the cluster does not answer: $(explain "$ERRORS") ($ERRORS)"
    die "cluster $GKE_CLUSTER has no JobSet; an administrator installs it: kubectl apply --server-side" \
      "-f https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml"
  }
  make_pools
}

make_pools() {
  [[ $GKE_NODE_POOLS == create ]] || return 0
  local number flags=("--machine-type=$GKE_MACHINE_TYPE" "--num-nodes=$NODES_PER_SLICE" "--node-locations=$ZONE"
    --scopes=https://www.googleapis.com/auth/cloud-platform --workload-metadata=GKE_METADATA)
  # A topology is given for slices of several nodes; one node has one topology only.
  ((NODES_PER_SLICE == 1)) || flags+=("--tpu-topology=$GKE_TOPOLOGY")
  [[ $SPOT == no ]] || flags+=(--spot)
  look_at_pools || die "the node pools of $GKE_CLUSTER cannot be listed: $(explain "$ERRORS") ($ERRORS)"
  for ((number = 0; number < SLICES; number++)); do
    [[ " ${POOLS[*]} " != *" $number "* ]] || continue
    pool_command create "$number" "${flags[@]}"
    run_or_explain "node pool $NAME-$number for $WANTED" "${POOL[@]}"
  done
  DRY_POOLS=yes
}

backend_start() {
  write_launch_folder "jax[tpu]"
  run_or_explain "copying to the bucket" gcloud storage cp "${LAUNCH_FILES[@]}" "gs://$BUCKET/$FOLDER/launch/"
  jobset >"$LAUNCH/jobset.yaml"
  kube apply "--filename=$LAUNCH/jobset.yaml"
  run_or_explain "the JobSet" "${KUBE[@]}"
  DRY_JOBSET="Completed "
}

jobset() {
  local spot=""
  [[ $SPOT == no ]] || spot='cloud.google.com/gke-spot: "true"'
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations: # all pods of a slice in one node pool, and no other slice's in it
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESUMES
    rules: # bad options or data (exit code 2, below): starting again does not help
      - name: refused
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $NODES_PER_SLICE
          completions: $NODES_PER_SLICE
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: { containerName: train, operator: In, values: [2] }
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              serviceAccountName: $GKE_SERVICE_ACCOUNT
              terminationGracePeriodSeconds: 25
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $GKE_ACCELERATOR
                cloud.google.com/gke-tpu-topology: $GKE_TOPOLOGY
                $spot
              containers:
                - name: train
                  image: $GKE_IMAGE
                  command: [bash, /bucket/$FOLDER/launch/worker.sh, install-and-train]
                  ports:
                    - containerPort: 8471
                    - containerPort: 8431
                  resources:
                    limits:
                      google.com/tpu: $GKE_CHIPS_PER_NODE
                  volumeMounts:
                    - name: bucket
                      mountPath: /bucket
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $BUCKET
                      mountOptions: implicit-dirs,metadata-cache:ttl-secs:0
YAML
}

backend_stop() {
  kube delete jobset "$NAME" --ignore-not-found
  run_or_explain "deleting the JobSet" "${KUBE[@]}"
  DRY_JOBSET=missing
}

backend_follow() {
  kube logs --follow --tail=-1 --container=train "--pod-running-timeout=$((WAIT_MINUTES + 1))m" \
    "--selector=$PODS,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  [[ $DRY_RUN == no ]] || { ask "" "${KUBE[@]}" && return; }
  "${KUBE[@]}"
}

backend_details() {
  kube get pods "--selector=$PODS" --output=wide
  ask "" "${KUBE[@]}" || true
  say "$ANSWER"
  kube get events --field-selector=reason=FailedScheduling
  ask "" "${KUBE[@]}" || true
  say "$ANSWER"
}

backend_left() {
  local number
  LEFT=""
  [[ $COMMAND != delete ]] || DRY_JOBSET="Completed "
  backend_state
  [[ $STATE == missing ]] || LEFT="the JobSet $NAME ($STATE)"
  look_at_pools || LEFT+="${LEFT:+, }perhaps node pools, which could not be listed"
  for number in "${POOLS[@]}"; do LEFT+="${LEFT:+, }the node pool $NAME-$number"; done
}

backend_remove() {
  backend_stop
  look_at_pools || die "the node pools of $GKE_CLUSTER cannot be listed, so none was deleted: $(explain "$ERRORS")"
  local number
  for number in "${POOLS[@]}"; do
    pool_command delete "$number"
    run_or_explain "deleting node pool $NAME-$number" "${POOL[@]}"
  done
}
