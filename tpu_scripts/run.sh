#!/usr/bin/env bash
# Creates, starts, watches and resumes until the training is finished, at most MAX_RESUMES times.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/main.sh"
main run "$@"
