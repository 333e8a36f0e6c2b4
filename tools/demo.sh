#!/usr/bin/env bash
# Run the demo in .venv:  bash tools/demo.sh [DIRECTORY]     (default: a new temporary one, which is kept)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment .venv test

directory="${1:-$(mktemp -d)/demo}"
"$python" -m varstore demo "$directory"
