#!/usr/bin/env bash
# Create environments with the frameworks that tests use, in child processes or with tools/test_adapters.sh.
#
#   bash tools/make_envs.sh [NAME ...]      (default: all)
#
# The frameworks cannot share one environment, so each has its own below $VARSTORE_ENVS (default: .envs in the project's
# root, which git ignores). A complete environment is left unchanged, so the script can run before every test run. An
# environment whose Python version is not installed is skipped with a message. axe-core, which looks for accessibility
# faults of a page, comes from npm.
set -u -o pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
envs="${VARSTORE_ENVS:-$root/.envs}"
failures=0

# name | python | packages
table='
torch       | 3.11 | torch==2.13.0 numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1
safetensors | 3.11 | safetensors==0.8.0 numpy ml_dtypes
paddle      | 3.11 | paddlepaddle==3.3.1 setuptools numpy
paddle2     | 3.11 | paddlepaddle==2.6.2 setuptools numpy<2
mindspore   | 3.11 | mindspore==2.10.0
onnx        | 3.11 | onnx==1.23.2 onnxruntime==1.31.1 numpy
onnx120     | 3.11 | onnx==1.20.1 numpy
zarr        | 3.11 | zarr==3.1.6 orbax-checkpoint==0.12.8 jax tensorstore xarray dask
jax         | 3.11 | jax flax optax
lightning   | 3.11 | torch==2.13.0 lightning omegaconf transformers accelerate peft
megengine   | 3.8  | megengine==1.13.0
oneflow     | 3.10 | oneflow==0.9.0 numpy<1.24 protobuf<4 nvidia-cudnn-cu11==8.5.0.96 nvidia-cublas-cu11==11.10.3.66
'

make_env() {
    local name="$1" version="$2" packages="$3" folder="$envs/$1" python stamp
    stamp="$version $packages"
    if [ "$(cat "$folder/.complete" 2>/dev/null)" = "$stamp" ]; then
        echo "$name: present"
        return 0
    fi
    if ! python="$(python_of "$version")"; then
        echo "$name: skipped, Python $version is not installed"
        return 0
    fi
    echo "$name: installing $packages"
    rm -rf "$folder"
    # shellcheck disable=SC2086
    if "$python" -m venv "$folder" && "$folder/bin/python" -m pip install --quiet $packages; then
        echo "$stamp" >"$folder/.complete"
        echo "$name: ready"
    else
        echo "$name: FAILED" >&2
        failures=$((failures + 1))
    fi
}

make_axe() {
    local folder="$envs/axe-core" wanted="axe-core@4.14.1"
    if [ "$(cat "$folder/.complete" 2>/dev/null)" = "$wanted" ]; then
        echo "axe-core: present"
    elif ! command -v npm >/dev/null; then
        echo "axe-core: skipped, npm is not installed"
    elif npm install --silent --no-fund --no-audit --ignore-scripts --prefix "$folder" "$wanted"; then
        echo "$wanted" >"$folder/.complete"
        echo "axe-core: ready"
    else
        echo "axe-core: FAILED" >&2
        failures=$((failures + 1))
    fi
}

mkdir -p "$envs"
if [ $# -eq 0 ] || [[ " $* " == *" axe-core "* ]]; then
    make_axe
fi
while IFS='|' read -r name version packages; do
    name="$(echo $name)" version="$(echo $version)" packages="$(echo $packages)"
    [ -n "$name" ] || continue
    if [ $# -eq 0 ] || [[ " $* " == *" $name "* ]]; then
        make_env "$name" "$version" "$packages"
    fi
done <<<"$table"
exit "$((failures > 0))"
