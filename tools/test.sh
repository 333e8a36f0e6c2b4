#!/usr/bin/env bash
# Run the tests in .venv:  bash tools/test.sh [PYTEST_ARGUMENT ...]
#
# Without arguments, all of them, in two processes side by side: many tests wait, and few need both processors. The
# folders that take long are one half, and whatever else there is the other.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment .venv test

cd "$root"
if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi
half="tests/disk tests/faults tests/storage"
exec "$python" tools/beside.py \
    "disk, faults, storage=$python -m pytest -q $half" "others=$python -m pytest -q tests ${half//tests/--ignore=tests}"
