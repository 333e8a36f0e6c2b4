# Sourced by the other tools. Sets $root, and $python to the interpreter of .venv, which is made, or brought
# up to date with pyproject.toml, when it is not. An environment that is there already is never thrown away.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

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
    echo "varstore needs Python 3.11 or later, and found none as python3.14, …, python3.11 or python3" >&2
    return 1
}

prepare_environment() {
    local wanted found
    wanted="$(cksum <"$root/pyproject.toml")"
    if is_new_enough "$python" && [ "$(cat "$root/.venv/.complete" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if ! is_new_enough "$python"; then
        found="$(find_python)"
        echo "making .venv with $("$found" --version)" >&2
        "$found" -m venv "$root/.venv"
    fi
    echo "installing varstore and its test tools into .venv" >&2
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$root[test]"
    echo "$wanted" >"$root/.venv/.complete"
}

prepare_environment
