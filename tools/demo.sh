#!/usr/bin/env bash
# Run the demo in its own environment, which contains only what the demo needs:
#
#   bash tools/demo.sh [DIRECTORY]     (default: a new temporary directory, which is not deleted)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment .envs/demo demo

directory="${1:-$(mktemp -d)/demo}"
examples="$root/tools/examples"
"$python" -m varstore demo "$directory"

echo
echo "The two scripts of OneFlow's document, one after the other: the second loads before it declares"
mkdir "$directory/oneflow"
cd "$directory/oneflow"
"$python" "$examples/mlp_mnist_origin.py"
"$python" "$examples/mlp_mnist_finetune.py"
"$python" -m varstore diff mlp_models_1 mlp_ext_models_1 || [ $? = 1 ] # 1: they differ
echo
echo "The checkpoints are in $directory. To look inside, run"
echo "  $python -m varstore ls $directory/mlp_ext_models_1"
