#!/usr/bin/env bash
# Deletes the machines, after asking; the bucket stays.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/main.sh"
main delete "$@"
