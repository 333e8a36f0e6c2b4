#!/usr/bin/env bash
# Run the tests that use live objects of a framework, in the environments that tools/make_envs.sh creates:
#
#   bash tools/test_adapters.sh
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
envs="${VARSTORE_ENVS:-$root/.envs}"

# environment | tests
table='
torch     | test_examples_frameworks test_torch_values test_torch_files test_torch_state test_torch_adapter test_torch_modules test_torch_optimizers test_torch_states test_v0_1_0 test_readme_frameworks test_docstrings test_rows test_torch_bundles test_torch_distributed_loading test_torch_distributed_saving test_torch_distributed_readme test_bench_distributed test_torch_distributed_manager
jax       | test_examples_frameworks test_jax_adapter test_jax_sharded test_v0_1_0 test_readme_frameworks test_docstrings
lightning | test_examples_frameworks test_lightning_adapter test_lightning_runs test_transformers_adapter test_readme_frameworks test_docstrings
mindspore | test_model_checkpoint test_mindspore_adapter test_docstrings test_readme_frameworks test_rows test_mindspore_bundles
paddle    | test_paddle_values test_paddle_adapter test_readme_frameworks test_docstrings test_rows test_paddle_bundles
paddle2   | test_paddle_values test_paddle_adapter test_readme_frameworks test_docstrings test_rows test_paddle_bundles
onnx      | test_onnx_adapter test_docstrings
onnx120   | test_onnx_adapter
zarr      | test_strangers_ocdbt_folders test_zarr_readers test_zarr_store test_docstrings
'

cd "$root"
commands=()
while IFS='|' read -r name tests; do
    name="$(echo $name)"
    [ -n "$name" ] || continue
    python="$envs/$name/bin/python"
    if [ ! -f "$envs/$name/.complete" ]; then
        echo "== $name: not run, because the environment $envs/$name is missing"
        continue
    fi
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$root" "pytest>=8" "hypothesis>=6.100"
    # shellcheck disable=SC2086
    commands+=("$name=$python -m pytest -q $(printf '%s\n' $tests | xargs -I{} find tests -name {}.py | xargs)")
done <<<"$table"
exec "$(find_python)" tools/beside.py "${commands[@]}"
