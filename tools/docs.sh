#!/usr/bin/env bash
# Build the reference in build/docs, in its own environment; any warning is an error:  bash tools/docs.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment .envs/docs docs

cd "$root"
exec "$python" -W error -m tools.docs build/docs
