#!/usr/bin/env bash
# Run every check that a change must pass, for developers and for CI. The first failure stops the script.
#
#   bash tools/check.sh [PYTEST_ARGUMENT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment .venv test

cd "$root"
step() {
    echo "== $1"
    shift
    "$@"
}

step "formatting" "$python" -m ruff format --check .
step "lint" "$python" -m ruff check .
step "types" "$python" -m mypy
step "generated code" "$python" tools/gen_proto.py --check
step "reference" bash tools/docs.sh
step "tests" bash tools/test.sh "$@"
