#!/usr/bin/env bash
# Shows the log of worker 0 until the training ends.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/main.sh"
main follow "$@"
