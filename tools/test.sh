#!/usr/bin/env bash
# Run the tests in .venv:  bash tools/test.sh [ARGUMENT OF PYTEST ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment .venv test

cd "$root"
exec "$python" -m pytest "$@"
