#!/usr/bin/env bash
# Creates the machines and waits until they are there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/main.sh"
main create "$@"
