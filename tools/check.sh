#!/usr/bin/env bash
# All that must hold before a change is done, for people and for CI; the first failure stops it.
#
#   bash tools/check.sh [ARGUMENT OF PYTEST ...]
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
