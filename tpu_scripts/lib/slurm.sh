# SLURM: the training is a job with one task a node, which has all its GPUs. SLURM puts the job back into its
# queue when a node is lost; a job that it gave up is submitted anew by resume.sh.
# shellcheck shell=bash

# What is assumed with --dry-run, where nothing is asked.
case $COMMAND in
delete) DRY_JOB="1 RUNNING None" ;;
*) DRY_JOB="" ;;
esac

LOG=$RUN_DIR/$NAME.log
CODE_FILE=$RUN_DIR/exit-code
JOB_FILE=$RUN_DIR/job-id

# JOB is the id of the job in the queue, JOB_STATE and REASON what SLURM says of it; empty if it is not there.
look() {
  JOB="" JOB_STATE="" REASON=""
  ask "$DRY_JOB" squeue --me --noheader "--name=$NAME" "--format=%i %T %r" || {
    say "$ERRORS"
    return 1
  }
  read -r JOB JOB_STATE REASON <<<"$ANSWER" || true
}

backend_connect() { need sbatch squeue scancel sinfo; }

backend_state() {
  if ! look; then
    STATE=unknown
  elif [[ $JOB_STATE == RUNNING || $JOB_STATE == COMPLETING ]]; then
    STATE=running
  elif [[ -n $JOB ]]; then
    STATE=queued
  elif [[ $DRY_RUN == yes ]]; then
    STATE=${DRY_STATE:-missing}
  elif [[ -f $CODE_FILE ]]; then
    case $(<"$CODE_FILE") in
    0) STATE=finished ;;
    2) STATE=refused ;;
    *) STATE=failed ;;
    esac
  elif [[ -f $JOB_FILE ]]; then
    STATE=lost # it left the queue without reaching the end of its script
    ask "" sacct --noheader --parsable2 --allocations "--jobs=$(<"$JOB_FILE")" --format=State,NodeList || true
    say "job $(<"$JOB_FILE") has ended: ${ANSWER:-SLURM keeps no account of it}"
  else
    STATE=missing
  fi
}

# Nothing to pay for is made: it is only seen whether a job could be submitted.
backend_create() {
  ask "$SLURM_PARTITION" sinfo --noheader "--partition=$SLURM_PARTITION" --format=%P ||
    die "SLURM does not answer: $ERRORS"
  [[ -n $ANSWER ]] || die "setting SLURM_PARTITION: there is no partition $SLURM_PARTITION; \`sinfo\` lists them"
  run mkdir -p "$RUN_DIR" || die "setting SLURM_DIR: $RUN_DIR cannot be made: $ERRORS"
}

backend_start() {
  write_launch_folder "$SLURM_JAX"
  batch_script >"$LAUNCH/job.sbatch"
  run_or_explain "copying to SLURM_DIR" mkdir -p "$RUN_DIR/launch"
  run_or_explain "copying to SLURM_DIR" cp "${LAUNCH_FILES[@]}" "$LAUNCH/job.sbatch" "$RUN_DIR/launch"
  # shellcheck disable=SC2016
  run_or_explain "installing" bash -c "$SLURM_SETUP"$'\n''exec bash "$0" install' "$RUN_DIR/launch/worker.sh"
  run_or_explain "forgetting the last job" rm -f "$CODE_FILE"
  local id
  if [[ $DRY_RUN == yes ]]; then
    run sbatch --parsable "$RUN_DIR/launch/job.sbatch"
    DRY_STATE=finished
    return
  fi
  run sbatch --parsable "$RUN_DIR/launch/job.sbatch" >"$SCRATCH/id" ||
    die "submitting a job of $WANTED failed: $(explain "$ERRORS")"
  id=$(<"$SCRATCH/id")
  printf '%s\n' "${id%%;*}" >"$JOB_FILE"
  say "job ${id%%;*} is submitted"
}

batch_script() {
  local flag gpus
  gpus=$(seq --separator=, 0 $((SLURM_GPUS_PER_NODE - 1)))
  cat <<EOS
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --partition=$SLURM_PARTITION
#SBATCH --nodes=$SLURM_NODES
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$SLURM_GPUS_PER_NODE
#SBATCH --cpus-per-task=$SLURM_CPUS_PER_TASK
#SBATCH --time=$SLURM_TIME
#SBATCH --output="$LOG"
#SBATCH --open-mode=append
#SBATCH --requeue
EOS
  for flag in "${SLURM_FLAGS[@]}"; do printf '#SBATCH %s\n' "$flag"; done
  cat <<EOS
$SLURM_SETUP
rm -f '$CODE_FILE'
# One process a node with all its GPUs; without this JAX gives each process the one GPU of its number.
export JAX_LOCAL_DEVICE_IDS=$gpus
# srun does not take it from the job by itself.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
code=0
srun --kill-on-bad-exit=1 bash '$RUN_DIR/launch/worker.sh' train || code=\$?
echo "\$code" >'$CODE_FILE'
exit "\$code"
EOS
}

backend_stop() {
  look || die "SLURM does not answer, so nothing was canceled"
  [[ -z $JOB ]] || run_or_explain "canceling job $JOB" scancel "$JOB"
  [[ ! -f $JOB_FILE ]] || run_or_explain "forgetting the last job" rm -f "$JOB_FILE"
  DRY_JOB=""
}

backend_follow() {
  if [[ $DRY_RUN == yes ]]; then
    ask "" tail --lines=+1 --follow=name --retry "$LOG"
    return
  fi
  # Once the keeper is gone, tail reads to the end and ends.
  sleep infinity &
  KEEPER=$!
  tail --lines=+1 --follow=name --retry "--pid=$KEEPER" "$LOG" &
  local reader=$!
  while backend_state && [[ $STATE == running || $STATE == queued || $STATE == unknown ]]; do pause; done
  { kill "$KEEPER" && wait "$KEEPER"; } 2>/dev/null || true
  wait "$reader"
}

backend_details() {
  look || true
  [[ -z $JOB ]] || say "job $JOB is $JOB_STATE${REASON:+ ($REASON)}; its log is $LOG"
}

backend_left() {
  LEFT=""
  if ! look; then
    LEFT="perhaps a job named $NAME: SLURM does not answer"
  elif [[ -n $JOB ]]; then
    LEFT="job $JOB ($JOB_STATE)"
  fi
}

backend_remove() { backend_stop; }
