#!/usr/bin/env bash
# Run the tests marked `core` on each Python that is present, and those marked `core` or `lowest` on the oldest with the
# lowest versions of the dependencies that pyproject.toml allows. The Python of .venv is left out: it runs all tests.
#
#   bash tools/core.sh [PYTEST_ARGUMENT ...]
#
# Each Python has an environment below $VARSTORE_ENVS (default: .envs in the project's root), which holds what varstore
# needs but not varstore, and is kept for later runs, also by other clones.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
envs="${VARSTORE_ENVS:-$root/.envs}"
cd "$root"

prepare() {
    local name="$1" python="$2" marked="$3" folder="$envs/$1" wanted
    shift 3
    wanted="$("$python" tools/requirements.py "$@" zarr) pytest>=8 hypothesis>=6.100"
    if [ "$(cat "$folder/.complete" 2>/dev/null)" != "$wanted" ]; then
        echo "$name: installing"
        rm -rf "$folder"
        "$python" -m venv "$folder"
        # shellcheck disable=SC2086
        "$folder/bin/python" -m pip install -qq --disable-pip-version-check $wanted
        echo "$wanted" >"$folder/.complete"
    fi
    commands+=("$name=$folder/bin/python --version && PYTHONPATH=$root $folder/bin/python -m pytest -q -m '$marked' \
        -p no:cacheprovider $files $arguments")
}

arguments="${*@Q}"
files="$(grep -rlE --include='test_*.py' 'pytest.mark.(core|lowest)' tests | xargs)"  # others may need packages that are not there
oldest= commands=()
use_environment .venv test
own="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
for version in 3.11 3.12 3.13 3.14; do
    if python="$(python_of "$version")"; then
        oldest="${oldest:-$python}"
        [ "$version" = "$own" ] || prepare "core-$version" "$python" core
    else
        echo "core-$version: not run, because Python $version is not installed"
    fi
done
[ -z "$oldest" ] || prepare core-lowest "$oldest" "core or lowest" --lowest
exec "$root/.venv/bin/python" tools/beside.py "${commands[@]}"
