#!/usr/bin/env bash
# Installs peftjax on all workers and starts the training, which goes on without this terminal.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/main.sh"
main start "$@"
