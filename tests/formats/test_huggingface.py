"""Folders that are written for `from_pretrained`, which the real transformers load."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import FIXTURES, ROOT

import varstore as vs
from varstore.cli import main
from varstore.errors import CheckpointExists, InvalidName, UsageError

MODEL = FIXTURES / "formats/huggingface/single"
CONFIG = json.loads((MODEL / "config.json").read_text())
LOAD = """
import sys, torch
from transformers import AutoModel
given, written = (AutoModel.from_pretrained(path, add_pooling_layer=False) for path in sys.argv[1:])
assert type(given) is type(written)
first, second = given.state_dict(), written.state_dict()
assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
print(len(first))
"""


def python_of(name: str) -> str:
    python = Path(os.environ.get("VARSTORE_ENVS", ROOT / ".envs")) / name / "bin/python"
    if not python.exists():
        pytest.skip(f"no environment {name}: run tools/make_envs.sh {name}")
    return str(python)


class Config:
    """What a configuration of transformers has."""

    def to_dict(self):
        return CONFIG


class NotCallable:
    """Not a configuration."""

    to_dict = 3


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 500])
def test_transformers_loads_what_was_written(tmp_path, shard_bytes):
    opened = vs.read(MODEL)
    vs.write(tmp_path / "model", opened, format="huggingface", shard_bytes=shard_bytes, config=Config())
    files = {file.name for file in (tmp_path / "model").iterdir()}
    assert ("model.safetensors.index.json" in files) is (shard_bytes == 500)
    assert json.loads((tmp_path / "model/config.json").read_text()) == CONFIG
    back = vs.read(tmp_path / "model")
    assert {name: array.tobytes() for name, array in back.items()} == {n: a.tobytes() for n, a in opened.items()}
    done = subprocess.run(
        [python_of("lightning"), "-c", LOAD, MODEL, tmp_path / "model"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(opened)


def test_a_checkpoint_becomes_a_folder_for_transformers(tmp_path):
    vs.convert(MODEL, tmp_path / "checkpoint")
    done = vs.convert(tmp_path / "checkpoint", tmp_path / "model", format="huggingface", dtype="bf16", config=CONFIG)
    assert done.format == "huggingface"
    assert {str(array.dtype) for array in vs.read(tmp_path / "model").values()} == {"bfloat16"}


def test_only_what_was_written_is_replaced(tmp_path):
    for shard_bytes in (8, 5_000_000_000):
        vs.write(
            tmp_path / "m", {"a": np.ones(2), "b": np.zeros(1)}, "huggingface", shard_bytes=shard_bytes, overwrite=True
        )
        assert len(vs.read(tmp_path / "m")) == 2
    assert [file.name for file in (tmp_path / "m").iterdir()] == ["model.safetensors"]
    with pytest.raises(CheckpointExists):
        vs.write(tmp_path / "m", {"a": np.ones(2)}, "huggingface")
    (tmp_path / "m/tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointExists):
        vs.write(tmp_path / "m", {"a": np.ones(2)}, "huggingface", overwrite=True)
    assert (tmp_path / "m/tokenizer.json").exists()


def test_the_configuration_of_an_adapter_makes_a_folder_of_peft(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "target_modules": {"v", "q"}}
    for overwrite in (False, True):
        vs.write(tmp_path / "m", {"a": np.ones(2)}, "huggingface", config=config, shard_bytes=1, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path / "m")) == ["adapter_config.json", "adapter_model.safetensors"]
    said = json.loads((tmp_path / "m/adapter_config.json").read_text())
    assert said == {"peft_type": "LORA", "r": 2, "target_modules": ["q", "v"]}
    assert list(vs.read(tmp_path / "m")) == ["a"]


@pytest.mark.parametrize("config", ["bert", 3, {"a": object()}, {"a": float("nan")}, {"\ud800": 1}, NotCallable()])
def test_a_configuration_is_json_data(tmp_path, config):
    with pytest.raises(UsageError, match=r"config: must be the content of config.json"):
        vs.write(tmp_path / "m", {"a": np.ones(2)}, "huggingface", config=config)
    assert not (tmp_path / "m").exists()


def test_the_command_writes_a_folder_too(tmp_path):
    command = ["convert", str(MODEL), str(tmp_path / "m"), "--format", "huggingface", "--shard-bytes", "500"]
    done = CliRunner().invoke(main, [*command, "--config", str(MODEL / "config.json")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "m/config.json").read_text()) == CONFIG
    assert (tmp_path / "m/model.safetensors.index.json").exists()
    refused = CliRunner().invoke(main, [*command, "--overwrite", "--config", str(MODEL / "model.safetensors")])
    assert refused.exit_code != 0
    assert (tmp_path / "m/config.json").exists()


def test_metadata_is_text_that_can_be_written(tmp_path):
    with pytest.raises(InvalidName, match="lone surrogate"):
        vs.write(tmp_path / "m", {"a": np.ones(2)}, "huggingface", metadata={"a": "\ud800"})
    assert not (tmp_path / "m").exists()
