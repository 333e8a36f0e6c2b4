"""The scripts of tools/examples for frameworks run, each where its packages can be imported."""

import pytest
from support.examples import run

SCRIPTS = {
    "torch_new_head.py": (("torch",), "resumed as if never stopped"),
    "jax_resume.py": (("jax", "flax", "optax"), "loaded          2  body/bias, body/kernel"),
    "transformers_peft.py": (("transformers", "accelerate", "peft"), "from_pretrained loads the adapter"),
    "lightning_topk.py": (("lightning",), "load_from_checkpoint loads the best step"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_does_what_it_says(tmp_path, script):
    packages, said = SCRIPTS[script]
    for package in packages:
        pytest.importorskip(package, exc_type=ImportError)
    assert said in run(script, tmp_path)
