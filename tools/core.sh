#!/usr/bin/env bash
# Run the tests marked `core` on each Python that is present, and on the oldest with the lowest versions of the
# dependencies that pyproject.toml allows.
#
#   bash tools/core.sh [PYTEST_ARGUMENT ...]
#
# Each Python has an environment below $VARSTORE_ENVS (default: .envs in the project's root), which holds what varstore
# needs but not varstore, and is kept for later runs, also by other clones.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
envs="${VARSTORE_ENVS:-$root/.envs}"
cd "$root"

run() {
    local name="$1" python="$2" folder="$envs/$1" wanted
    shift 2
    wanted="$("$python" tools/requirements.py "$@" zarr) pytest>=8 hypothesis>=6.100"
    if [ "$(cat "$folder/.complete" 2>/dev/null)" != "$wanted" ]; then
        echo "$name: installing"
        rm -rf "$folder"
        "$python" -m venv "$folder"
        # shellcheck disable=SC2086
        "$folder/bin/python" -m pip install -qq --disable-pip-version-check $wanted
        echo "$wanted" >"$folder/.complete"
    fi
    echo "== $name: $("$folder/bin/python" --version)"
    # shellcheck disable=SC2086
    PYTHONPATH="$root" "$folder/bin/python" -m pytest -q -m core -p no:cacheprovider $files "${arguments[@]}" ||
        failures=$((failures + 1))
}

arguments=("$@")
files="$(grep -rl --include='test_*.py' 'pytest.mark.core' tests)"  # others may need packages that are not there
failures=0 oldest=
for version in 3.11 3.12 3.13 3.14; do
    if python="$(python_of "$version")"; then
        oldest="${oldest:-$python}"
        run "core-$version" "$python"
    else
        echo "== core-$version: not run, because Python $version is not installed"
    fi
done
[ -z "$oldest" ] || run core-lowest "$oldest" --lowest
exit "$((failures > 0))"
