#!/usr/bin/env bash
# Run the tests in .venv:  bash tools/test.sh [PYTEST_ARGUMENT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment .venv test

cd "$root"
exec "$python" -m pytest "$@"
