# The commands, in terms of what every backend has: backend_connect, state, create, start, stop,
# follow, details, left and remove. A run is in one of these states:
#   missing   nothing is there               waiting   machines are asked for (cloud-tpu)
#   ready     machines without a training    queued    the job waits for machines (gke, slurm)
#   running   it trains                      finished  it trained to its end
#   refused   its options cannot be used     failed    it ended otherwise
#   lost      machines were taken away       deleting  somebody deletes them
#   unknown   nobody says
# shellcheck shell=bash

LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$LIB/common.sh"
. "$LIB/validate.sh"
. "$LIB/launch.sh"

USAGE="options: --dry-run (print every command, run none), --settings FILE, --yes (delete.sh: do not ask)"

WATCHING=no          # whether run.sh watches a run
DELETE_ON_FAILURE=no # whether run.sh, when it gives up, deletes what there is

main() { # COMMAND OPTIONS...
  COMMAND=$1
  shift
  SETTINGS=$SCRIPTS/settings.sh YES=no
  while (($# > 0)); do
    case $1 in
    --dry-run) DRY_RUN=yes ;;
    --yes) YES=yes ;;
    --settings)
      (($# > 1)) || die "--settings needs a file"
      SETTINGS=$2
      shift
      ;;
    --help | -h)
      sed -n '2s/^# //p' "$SCRIPTS/$COMMAND.sh"
      echo "$USAGE"
      return
      ;;
    *) die "there is no option '$1'; $USAGE" ;;
    esac
    shift
  done
  [[ -f $SETTINGS ]] || die "there is no settings file $SETTINGS"
  bash -n "$SETTINGS" || die "$SETTINGS cannot be read by bash: see the line above"
  # shellcheck source=../settings.sh
  . "$SETTINGS"
  check_settings
  SCRATCH=$(mktemp -d)
  trap ended EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  case $BACKEND in
  cloud-tpu) . "$LIB/google.sh" && . "$LIB/cloud-tpu.sh" ;;
  gke) . "$LIB/google.sh" && . "$LIB/gke.sh" ;;
  slurm) . "$LIB/slurm.sh" ;;
  esac
  backend_connect
  "do_$COMMAND"
}

command_line() { # COMMAND OPTIONS...: as the user types it
  local words=("$SCRIPTS/$1.sh" "${@:2}")
  [[ $SETTINGS == "$SCRIPTS/settings.sh" ]] || words+=(--settings "$SETTINGS")
  as_typed "${words[@]}"
}

# Whatever ends a command that has changed something, what is there is said.
ended() {
  local code=$?
  trap - EXIT
  trap '' INT TERM
  if ((code != 0)) && [[ $MUTATED == yes || $WATCHING == yes ]] && [[ $COMMAND != delete ]]; then
    # Ctrl-C leaves the training running; a run that cannot go on leaves nothing.
    if [[ $DELETE_ON_FAILURE == yes && $code == 1 ]]; then
      say "DELETE_AFTER_RUN=always:"
      (backend_remove) || true
    fi
    if backend_left && [[ -z $LEFT ]]; then
      say "Nothing is left behind."
    else
      say "Still there, and perhaps paid for: $LEFT."
      say "  to delete it:   $(command_line delete)"
      say "  to bring it on: $(command_line resume)"
    fi
  fi
  [[ -z ${KEEPER-} ]] || kill "$KEEPER" 2>/dev/null || true
  rm -rf "$SCRATCH"
  exit "$code"
}

do_create() {
  backend_create
  say "$NAME is there; next: $(command_line start)"
}

do_start() {
  backend_state
  case $STATE in
  ready | finished | failed | refused) ;;
  missing) [[ $BACKEND != cloud-tpu ]] || die "there is no $NAME: create.sh first" ;;
  running | queued) die "$NAME is $STATE already: follow.sh shows its log, and delete.sh ends it" ;;
  *) die "$NAME is $STATE: status.sh says more, and resume.sh brings it back" ;;
  esac
  [[ $BACKEND == cloud-tpu || $STATE == missing ]] || backend_stop
  backend_start || exit 1
  say "$NAME is started; its log: $(command_line follow)"
}

do_follow() { backend_follow; }

do_status() {
  backend_state
  echo "$NAME: $STATE"
  backend_details || true
}

do_resume() {
  backend_state
  resume_from "$STATE" || exit 1
}

resume_from() { # STATE
  case $1 in
  running | queued) say "$NAME is $1: there is nothing to resume" ;;
  finished) say "$NAME is finished; $RUN_DIR/output has the result" ;;
  unknown) die "it cannot be seen how $NAME is, so nothing was changed; try again in a few minutes" ;;
  missing | waiting)
    backend_create
    backend_start
    ;;
  ready | failed | refused)
    backend_stop || return
    [[ $BACKEND == cloud-tpu ]] || backend_create
    backend_start
    ;;
  lost | deleting)
    say "$NAME is $1; it is made anew and goes on from its checkpoint in $RUN_DIR/output"
    backend_remove
    backend_create
    backend_start
    ;;
  esac
}

do_delete() {
  backend_left
  if [[ -z $LEFT ]]; then
    say "there is nothing of $NAME to delete"
    return
  fi
  confirm "Delete $LEFT? The results in $RUN_DIR stay."
  backend_remove
  say "$NAME is deleted; the results in $RUN_DIR stay"
}

do_run() {
  local resumes=0 unseen=0 before="" since=$SECONDS
  backend_state
  [[ $STATE == unknown || $DELETE_AFTER_RUN != always ]] || DELETE_ON_FAILURE=yes
  resume_from "$STATE" || true # the first look below sees what became of it
  WATCHING=yes
  while true; do
    pause
    backend_state
    if [[ $STATE == failed || $STATE == lost ]]; then # of a slice that is being taken away: seen whole a look later
      pause
      backend_state
    fi
    [[ $STATE == "$before" ]] || { since=$SECONDS && progress "$NAME" "$STATE"; }
    before=$STATE
    [[ $STATE == unknown ]] || unseen=0
    case $STATE in
    finished) break ;;
    running | deleting) continue ;;
    queued | waiting)
      [[ $BACKEND == slurm ]] || ((SECONDS - since < WAIT_MINUTES * 60)) || {
        backend_details || true
        give_up "no machines in WAIT_MINUTES=$WAIT_MINUTES: $WHERE has no $WANTED free, or no quota for it"
      }
      ;;
    unknown)
      ((unseen += 1))
      ((unseen < 20)) || {
        DELETE_ON_FAILURE=no # it may be training
        give_up "it could not be seen in 20 looks how $NAME is"
      }
      ;;
    missing) give_up "$NAME is there no more: somebody deleted it" ;;
    refused) give_up "peftjax cannot use these options or this data: follow.sh shows its last lines" ;;
    *)
      ((resumes < MAX_RESUMES)) || give_up "it is $STATE after MAX_RESUMES=$MAX_RESUMES resumes"
      resumes=$((resumes + 1))
      say "$NAME is $STATE: resume $resumes of at most $MAX_RESUMES"
      resume_from "$STATE" || true
      before=""
      ;;
    esac
  done
  say "$NAME is finished; $RUN_DIR/output has the result"
  [[ $DELETE_AFTER_RUN == never ]] || backend_remove
}

give_up() { die "$*; its checkpoints are in $RUN_DIR/output, and resume.sh goes on from them"; }
