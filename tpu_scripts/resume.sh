#!/usr/bin/env bash
# Brings a run back after preemption, a lost node or a failure; it goes on from its checkpoint.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/main.sh"
main resume "$@"
