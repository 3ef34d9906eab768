# Cloud TPU: a slice, or several, as one queued resource.
# shellcheck shell=bash

# What is assumed with --dry-run, where nothing is asked.
case $COMMAND in
create | run) DRY_QUEUE=missing DRY_WORKERS=ready ;;
resume) DRY_QUEUE=SUSPENDED DRY_WORKERS=ready ;;
*) DRY_QUEUE=ACTIVE DRY_WORKERS=ready ;;
esac

queue() { # VERB FLAGS...: the words of a command about the queued resource
  QUEUE_COMMAND=(gcloud compute tpus queued-resources "$1" "$NAME" "--project=$PROJECT" "--zone=$ZONE" "${@:2}")
}

ssh_command() { # WORKER NODE COMMAND
  queue ssh "${SSH_FLAGS[@]}" "--worker=$1" "--node=$2" "--command=$3" --quiet
}

# QUEUE is the state as Cloud TPU names it, or missing, or unknown where the answer says neither.
look() {
  queue describe "--format=value(state.state)"
  if ask "$DRY_QUEUE" "${QUEUE_COMMAND[@]}"; then
    QUEUE=$ANSWER
  elif not_found; then
    QUEUE=missing
  else
    QUEUE=unknown
    say "$ERRORS"
  fi
  [[ -n $QUEUE ]] || QUEUE=unknown
}

backend_connect() { need gcloud; }

backend_state() {
  look
  case $QUEUE in
  missing | unknown) STATE=$QUEUE ;;
  ACTIVE) workers ;;
  DELETING) STATE=deleting ;;
  SUSPENDING | SUSPENDED | FAILED) STATE=lost ;;
  *) STATE=waiting ;;
  esac
}

# The state of the training on an active slice: that of the worst worker.
workers() {
  ssh_command all all "test ! -f peftjax-launch/worker.sh && echo peftjax-state=ready || bash peftjax-launch/worker.sh state"
  if ! ask "peftjax-state=$DRY_WORKERS" "${QUEUE_COMMAND[@]}"; then
    say "$ERRORS"
    nodes
    return
  fi
  local word seen=" "
  for word in refused failed running ready finished; do
    [[ $ANSWER != *"peftjax-state=$word"* ]] || seen+="$word "
  done
  case $seen in
  *refused*) STATE=refused ;;
  *failed* | *ready\ finished* | *running\ ready*) STATE=failed ;; # some have no training: it cannot go on
  *running*) STATE=running ;;
  *ready*) STATE=ready ;;
  *finished*) STATE=finished ;;
  *) STATE=unknown ;;
  esac
}

# The workers do not answer: lost where a node is gone for good, else unknown.
nodes() {
  local number node
  STATE=unknown
  for ((number = 0; number < SLICES; number++)); do
    node=$NAME
    ((SLICES == 1)) || node=$NAME-$number
    if ask READY gcloud compute tpus tpu-vm describe "$node" "--project=$PROJECT" "--zone=$ZONE" "--format=value(state)"; then
      [[ $ANSWER =~ ^(READY|CREATING|STARTING|RESTARTING|REPAIRING)$ ]] || STATE=lost
    elif not_found; then
      STATE=lost ANSWER=gone
    fi
    [[ $STATE != lost ]] || {
      say "node $node is $ANSWER"
      return
    }
  done
}

backend_create() {
  check_bucket
  look
  case $QUEUE in
  missing) request ;;
  unknown) die "Cloud TPU did not say whether $NAME exists; nothing was created" ;;
  ACTIVE) say "$NAME exists already" ;;
  SUSPENDING | SUSPENDED | FAILED | DELETING) die "$NAME is $QUEUE: \`$(command_line resume)\` makes it anew" ;;
  *) say "$NAME is requested already" ;;
  esac
  await_active
}

request() {
  local flags=("--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION")
  if ((SLICES == 1)); then
    flags+=("--node-id=$NAME")
  else
    flags+=("--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  # A request that is older is dropped, so that none is served when nobody waits for it any more.
  ((WAIT_MINUTES == 0)) || flags+=("--valid-until-duration=PT${WAIT_MINUTES}M")
  [[ $SPOT == no ]] || flags+=(--spot)
  [[ $RESERVED == no ]] || flags+=(--reserved)
  [[ -z ${NETWORK-} ]] || flags+=("--network=$NETWORK")
  [[ -z ${SUBNETWORK-} ]] || flags+=("--subnetwork=$SUBNETWORK")
  [[ -z ${SERVICE_ACCOUNT-} ]] || flags+=("--service-account=$SERVICE_ACCOUNT")
  queue create "${flags[@]}" --scopes=https://www.googleapis.com/auth/cloud-platform "${CREATE_FLAGS[@]}" --quiet
  run_or_explain "the request for $WANTED in $ZONE" "${QUEUE_COMMAND[@]}"
  DRY_QUEUE=ACTIVE
}

await_active() {
  local started=$SECONDS
  while look; do
    case $QUEUE in
    ACTIVE) return ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING | missing)
      queue describe "--format=value(state.failedData.error.message)"
      ask "" "${QUEUE_COMMAND[@]}" || true
      die "$WANTED in $ZONE is $QUEUE${ANSWER:+: $ANSWER}; $(explain "$ANSWER")"
      ;;
    esac
    ((SECONDS - started < WAIT_MINUTES * 60)) ||
      die "$NAME is still $QUEUE after WAIT_MINUTES=$WAIT_MINUTES: create.sh waits on, a larger WAIT_MINUTES waits longer"
    progress "$NAME" "$QUEUE"
    pause
  done
}

backend_start() {
  write_launch_folder "jax[tpu]"
  run_or_say "copying to the workers" gcloud compute tpus queued-resources scp "$LAUNCH" "$NAME:" \
    "--project=$PROJECT" "--zone=$ZONE" "${SSH_FLAGS[@]}" --recurse --worker=all --node=all --quiet || return
  ssh_command all all "bash peftjax-launch/worker.sh start"
  run_or_say "starting on the workers" "${QUEUE_COMMAND[@]}" || return
  DRY_WORKERS=finished
}

backend_stop() {
  ssh_command all all "test ! -f peftjax-launch/worker.sh || bash peftjax-launch/worker.sh stop"
  run_or_say "stopping what is left on the workers" "${QUEUE_COMMAND[@]}"
}

backend_follow() {
  look
  [[ $QUEUE == ACTIVE ]] || die "$NAME is $QUEUE; the logs of workers that are gone are copied every minute:" \
    "gcloud storage ls gs://$BUCKET/$FOLDER/logs/"
  ssh_command 0 0 "bash peftjax-launch/worker.sh follow"
  [[ $DRY_RUN == no ]] || { ask "" "${QUEUE_COMMAND[@]}" && return; }
  "${QUEUE_COMMAND[@]}"
}

backend_details() {
  queue describe
  ask "" "${QUEUE_COMMAND[@]}" && say "$ANSWER"
}

# LEFT is what exists and may be paid for.
backend_left() {
  look
  LEFT=""
  [[ $QUEUE == missing ]] || LEFT="the queued resource $NAME in $ZONE ($QUEUE)"
}

# Deletes it and waits until it is gone: its name can be used again only then.
backend_remove() {
  look
  while_it_is SUSPENDING
  if [[ $QUEUE != DELETING && $QUEUE != missing ]]; then
    queue delete --force --quiet
    run "${QUEUE_COMMAND[@]}" || not_found || die "deleting $NAME failed: $(explain "$ERRORS")"
    DRY_QUEUE=missing
    look
  fi
  while_it_is "[!m]*" # anything but missing
}

while_it_is() { # PATTERN
  local started=$SECONDS
  # shellcheck disable=SC2053
  while [[ $QUEUE == $1 ]]; do
    ((SECONDS - started < 900)) || die "$NAME is still $QUEUE after 15 minutes; status.sh says how it goes on"
    progress "$NAME" "$QUEUE"
    pause
    look
  done
}
