# The folder that the workers get: what to install and run (`job.sh`), the script that does it
# (`worker.sh`), and the package where it is a file of this machine.
# shellcheck shell=bash

# Writes the folder; nothing of it leaves this machine yet. LAUNCH_FILES are its files.
write_launch_folder() { # JAX REQUIREMENT
  local root file requirement=$PACKAGE
  root=$(cd "$SCRIPTS/.." && pwd)
  LAUNCH=$root/outputs/clusters/$NAME/peftjax-launch
  mkdir -p "$LAUNCH" || die "$LAUNCH cannot be made"
  rm -f "$LAUNCH"/*
  cp "$SCRIPTS/lib/worker.sh" "$LAUNCH/worker.sh" || die "$LAUNCH cannot be written"
  LAUNCH_FILES=("$LAUNCH/worker.sh" "$LAUNCH/job.sh")
  if [[ $PACKAGE == checkout ]]; then
    file=$LAUNCH/peftjax.tar.gz
    local top=${root##*/}
    run_or_explain "packing the checkout" tar --create --gzip --file="$file" --exclude=__pycache__ \
      --directory="$root/.." "$top/pyproject.toml" "$top/README.md" "$top/LICENSE" "$top/peftjax"
    requirement=file:peftjax.tar.gz
  elif [[ $PACKAGE == *.whl || $PACKAGE == *.tar.gz ]] && [[ $PACKAGE != *://* ]]; then
    [[ -f $PACKAGE ]] || bad PACKAGE "there is no file '$PACKAGE'"
    file=$LAUNCH/${PACKAGE##*/}
    cp "$PACKAGE" "$file" || die "$file cannot be written"
    requirement=file:${PACKAGE##*/}
  fi
  [[ -z ${file-} ]] || LAUNCH_FILES+=("$file")
  {
    local command=(train "${DISTRIBUTED_ARGS[@]}" "${TRAIN_ARGS[@]}" --output "$RUN_DIR/output")
    printf '# Written by %s.sh from the settings; do not edit.\n' "$COMMAND"
    printf 'NAME=%q\nBUCKET=%q\nRUN_DIR=%q\n' "$NAME" "$BUCKET" "$RUN_DIR"
    printf 'PYTHON_VERSION=%q\nJAX=%q\nREQUIREMENT=%q\n' "$PYTHON_VERSION" "$1" "$requirement"
    [[ $BACKEND != slurm ]] || printf 'VENV=%q\n' "$RUN_DIR/venv"
    printf 'COMMAND=('
    printf ' %q' "${command[@]}"
    printf ' )\nENVIRONMENT=('
    ((${#ENVIRONMENT[@]} == 0)) || printf ' %q' "${ENVIRONMENT[@]}"
    printf ' )\n'
  } >"$LAUNCH/job.sh" || die "$LAUNCH/job.sh cannot be written"
}
