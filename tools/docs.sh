#!/usr/bin/env bash
# Build the reference into build/docs, in an environment of its own; a warning is an error:  bash tools/docs.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment .envs/docs docs

cd "$root"
exec "$python" -W error tools/docs.py build/docs
