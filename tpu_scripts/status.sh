#!/usr/bin/env bash
# Says what there is and what it does.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/main.sh"
main status "$@"
