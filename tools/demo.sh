#!/usr/bin/env bash
# Run the demo in its own environment, which contains only what the demo needs:
#
#   bash tools/demo.sh [DIRECTORY]     (default: a new temporary directory, which is not deleted)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment .envs/demo demo

directory="${1:-$(mktemp -d)/demo}"
"$python" -m varstore demo "$directory"
echo
echo "The checkpoints are in $directory. To look inside, run"
echo "  $python -m varstore ls $directory/mlp_ext_models_1"
