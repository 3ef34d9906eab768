#!/usr/bin/env bash
# Runs on a worker. `worker.sh start` installs, mounts the bucket and trains in the background; `state`,
# `follow` and `stop` are about that training; `install` and `train` are for batch systems, which have
# their own background. What to run stands in `job.sh` beside this file.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
. "$HERE/job.sh"
VENV=${VENV:-$HOME/peftjax-venv}
LOG=$HOME/$NAME.log
PID_FILE=$HOME/$NAME.pid
CODE_FILE=$HOME/$NAME.exit-code

install() {
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  local requirement=$REQUIREMENT
  [[ $requirement != file:* ]] || requirement="peftjax[train] @ file://${HERE// /%20}/${requirement#file:}"
  uv venv --quiet --allow-existing --python "$PYTHON_VERSION" "$VENV"
  uv pip install --quiet --python "$VENV/bin/python" --reinstall-package peftjax "$JAX" "$requirement"
}

mount_bucket() {
  mountpoint --quiet /bucket && return
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc repository
    repository=gcsfuse-$(lsb_release --codename --short)
    curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt $repository main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update --quiet=2
    sudo apt-get install --quiet=2 --yes gcsfuse
  fi
  sudo mkdir -p /bucket
  sudo chown "$(id --user)" /bucket
  # No cache of names: what one worker writes, the others see at once.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$BUCKET" /bucket
}

alive() { [[ -f $PID_FILE ]] && kill -0 "$(<"$PID_FILE")" 2>/dev/null; }

state() {
  local word=ready
  if [[ -f $CODE_FILE ]]; then
    case $(<"$CODE_FILE") in
    0) word=finished ;;
    2) word=refused ;; # options or data that cannot be used: trying again does not help
    *) word=failed ;;
    esac
  elif alive; then
    word=running
  elif [[ -f $PID_FILE ]]; then
    word=failed
  fi
  echo "$word"
}

train() {
  ((${#ENVIRONMENT[@]} == 0)) || export "${ENVIRONMENT[@]}"
  exec "$VENV/bin/peftjax" "${COMMAND[@]}"
}

# Trains, and copies the log to the bucket every minute, so that it is there when the machine is not.
keep_log() {
  local code=0 child
  (train) &
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    sleep 1
    ((SECONDS % 60)) || copy_log
  done
  wait "$child" || code=$?
  copy_log
  echo "$code" >"$CODE_FILE"
}

copy_log() { mkdir -p "$RUN_DIR/logs" && cp "$LOG" "$RUN_DIR/logs/$(hostname).log" || true; }

start() {
  if alive && [[ ! -f $CODE_FILE ]]; then
    echo "$(hostname): a training is running already" >&2
    exit 3
  fi
  install
  mount_bucket
  rm -f "$CODE_FILE"
  nohup setsid bash "$HERE/worker.sh" keep_log >>"$LOG" 2>&1 </dev/null &
  echo $! >"$PID_FILE"
  # Its group is what `stop` ends, so it has to be there before anybody can ask for that.
  until kill -0 -- "-$!" 2>/dev/null || ! alive; do sleep 0.1; done
}

stop() {
  if alive; then
    local group left
    group=$(<"$PID_FILE")
    kill -TERM -- "-$group" 2>/dev/null || true
    for ((left = 300; left > 0; left--)); do
      kill -0 -- "-$group" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL -- "-$group" 2>/dev/null || true
  fi
  rm -f "$PID_FILE" "$CODE_FILE"
}

follow() {
  if alive; then tail --lines=+1 --pid="$(<"$PID_FILE")" --follow=name "$LOG"; else cat "$LOG"; fi
}

case ${1-} in
start | stop | follow | install | train | keep_log) "$1" ;;
state) echo "peftjax-state=$(state) $(hostname)" ;;
install-and-train)
  install
  train
  ;;
*)
  echo "worker.sh: start, stop, state, follow, install, train or install-and-train, not '${1-}'" >&2
  exit 2
  ;;
esac
