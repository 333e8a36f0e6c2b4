# Sourced by the other scripts. Sets $root and defines `python_of VERSION`, which prints the path of an interpreter of
# that version, from PATH or pyenv, and `use_environment FOLDER EXTRA`, which sets $python to the
# interpreter of an environment below the root that contains varstore and the packages of an extra. The environment is
# created if it is missing, and updated if pyproject.toml has changed; an existing one is never deleted.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

python_of() {
    local version="$1" candidate
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

is_new_enough() {
    "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "varstore needs Python 3.11 or later, but none of python3.14, …, python3.11 and python3 is one" >&2
    return 1
}

use_environment() {
    local folder="$root/$1" extra="$2" wanted found
    python="$folder/bin/python"
    wanted="$extra $(cksum <"$root/pyproject.toml")"
    if is_new_enough "$python" && [ "$(cat "$folder/.complete" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if ! is_new_enough "$python"; then
        found="$(find_python)"
        echo "creating $1 with $("$found" --version)" >&2
        "$found" -m venv "$folder"
    fi
    echo "installing varstore[$extra] into $1" >&2
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$root[$extra]"
    echo "$wanted" >"$folder/.complete"
}
