# What all commands share: messages, running or printing a command, asking a service, waiting.
# shellcheck shell=bash

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "these scripts need bash 4.4 or newer; this is $BASH_VERSION" >&2
  exit 1
}
SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=no
MUTATED=no # whether a command was run that makes, changes or deletes something

say() { printf '%s\n' "$*" >&2; }

die() {
  say "$COMMAND.sh: $*"
  exit 1
}

# A command as one line that bash reads back as the same words.
as_typed() {
  local word line=""
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "${line# }"
}

# Runs a command that changes something, or with --dry-run prints it. What it writes to standard error is
# also in ERRORS afterwards, for `explain`.
run() {
  if [[ $DRY_RUN == yes ]]; then
    as_typed "$@"
    return
  fi
  say "+ $(as_typed "$@")"
  MUTATED=yes
  local code=0
  { "$@" 2>&1 1>&3 | tee "$SCRATCH/errors" >&2; } 3>&1 || code=$?
  ERRORS=$(<"$SCRATCH/errors")
  return "$code"
}

# Asks a service, which changes nothing: `ask ASSUMED COMMAND...` leaves the answer in ANSWER and its
# errors in ERRORS. With --dry-run nothing is asked and the answer is ASSUMED.
ask() {
  local assumed=$1 code=0
  shift
  if [[ $DRY_RUN == yes ]]; then
    printf '# asks: %s\n' "$(as_typed "$@")"
    ANSWER=$assumed ERRORS=""
    return
  fi
  "$@" >"$SCRATCH/answer" 2>"$SCRATCH/errors" </dev/null || code=$?
  ANSWER=$(<"$SCRATCH/answer") ERRORS=$(<"$SCRATCH/errors")
  return "$code"
}

# Without this an absent program would read like an absent slice.
need() { # PROGRAM...
  local program
  for program; do
    [[ $DRY_RUN == yes ]] || command -v "$program" >/dev/null || die "$program is not on this machine's PATH: install it"
  done
}

not_found() { [[ ${ERRORS,,} == *"not_found"* || ${ERRORS,,} == *"notfound"* || ${ERRORS,,} == *"not found"* ]]; }

pause() { [[ $DRY_RUN == yes ]] || sleep "$POLL_SECONDS"; }

# One line a look: what is waited for, how it stands, and how long it has been.
progress() { say "$1: $2, $((SECONDS / 60)) min $((SECONDS % 60)) s"; }

confirm() {
  [[ $YES == yes || $DRY_RUN == yes ]] && return
  local answer=""
  [[ -t 0 ]] || die "delete asks first, and there is no terminal to ask on: give --yes"
  read -r -p "$1 [y/N] " answer
  [[ $answer == [yY]* ]] || die "nothing was deleted"
}

# The remedy for what a service said, in one sentence.
explain() {
  local said=${1,,}
  case ${said//quota project/} in
  *permission* | *forbidden* | *unauthenticated* | *reauthentication* | *"gcloud auth login"*)
    printf '%s' "the account in use may not do this: \`gcloud auth login\`, and roles such as roles/tpu.admin" \
      " or roles/container.developer on project ${PROJECT:-}"
    ;;
  *quota*)
    printf '%s' "the project's quota does not allow $WANTED in $WHERE: ask for more at" \
      " https://console.cloud.google.com/iam-admin/quotas, delete queued resources that are failed or" \
      " suspended (they count too), or ask for less (ACCELERATOR_TYPE, GKE_TOPOLOGY, SLICES)"
    ;;
  *"no more capacity"* | *stockout* | *resource_exhausted* | *"resource pool exhausted"* | *resource_pool_exhausted* | *"insufficient"*"capacity"*)
    printf '%s' "$WHERE has no $WANTED free now: choose another ZONE, SPOT=no, a smaller slice, or try later"
    ;;
  *already*exists*) printf '%s' "the name $NAME is taken: choose another NAME, or delete what has it" ;;
  *"submit"*"limit"* | *qos* | *"accounting"* | *"account/partition"*)
    printf '%s' "the account's limits on $WHERE do not allow this job: fewer SLURM_NODES, a shorter SLURM_TIME," \
      " or another --account or --qos in SLURM_FLAGS"
    ;;
  *partition*) printf '%s' "SLURM_PARTITION=$SLURM_PARTITION cannot be used: \`sinfo\` lists those that can" ;;
  "") printf '%s' "no reason is given; status.sh shows all that is known" ;;
  *) printf '%s' "see the message above" ;;
  esac
}

run_or_explain() { # WHAT COMMAND...
  local what=$1
  shift
  run "$@" || die "$what failed: $(explain "$ERRORS")"
}

# The same where the caller can go on: returns 1.
run_or_say() { # WHAT COMMAND...
  local what=$1
  shift
  run "$@" && return
  say "$COMMAND.sh: $what failed: $(explain "$ERRORS")"
  return 1
}
