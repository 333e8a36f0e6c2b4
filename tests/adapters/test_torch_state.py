"""What scripts of torch hold beside tensors comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import varstore as vs  # noqa: E402
from varstore.adapters import torch as vt  # noqa: E402
from varstore.errors import ManifestError, UsageError  # noqa: E402

PLAIN = {
    "size": torch.Size([2, 3]),
    "no size": torch.Size([]),
    "types": [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.quint8],
    "devices": [torch.device("cpu"), torch.device("cuda:1"), torch.device("mps"), torch.device("meta")],
    "keys": {torch.float32: 1, torch.device("cpu"): 2, torch.Size([1]): 3},
}


@pytest.mark.parametrize("name", PLAIN)
def test_sizes_types_and_devices(tmp_path: Path, name: str) -> None:
    vs.save_state(tmp_path / "c", PLAIN[name])
    back = vs.load_state(tmp_path / "c")
    assert back == PLAIN[name]
    assert type(back) is type(PLAIN[name])


def test_a_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    torch.randn(5, generator=generator)
    vt.save(tmp_path / "c", {"generator": generator, "rng": torch.get_rng_state()})
    expected = torch.randn(9, generator=generator)
    for options in ({}, {"map_location": "cpu"}, {"framework": "numpy"}):
        back = vs.load_state(tmp_path / "c", **options)["generator"]
        assert torch.equal(torch.randn(9, generator=back), expected)
    assert torch.equal(vt.load(tmp_path / "c")["rng"], vs.load_state(tmp_path / "c")["rng"])


WRONG = {
    "a state that is none": ({"$": "torch.Generator", "name": "w"}, "does not describe a torch.Generator"),
    "a type that is none": ({"$": "torch.dtype", "items": ["load"]}, "'load' is not a type"),
    "a type with code": ({"$": "torch.dtype", "items": ["__name__"]}, "is not a type"),
    "a device that is none": ({"$": "torch.device", "items": ["privateuseone"]}, "is not a device"),
    "a size of text": ({"$": "torch.Size", "items": ["a"]}, "other things than integers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tree_that_is_wrong_is_an_error_of_the_manifest(tmp_path: Path, name: str) -> None:
    tree, why = WRONG[name]
    vs.save(tmp_path / "c", {"w": np.zeros(2)}, tree=json.dumps({"a": tree}))
    with pytest.raises(ManifestError, match=why):
        vs.load_state(tmp_path / "c")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_generator_of_a_device_that_is_not_here(tmp_path: Path) -> None:
    tree: Any = {"$": "torch.Generator", "name": "w", "device": "cuda"}
    vs.save(tmp_path / "c", {"w": np.zeros(16, np.uint8)}, tree=json.dumps(tree))
    for options in ({}, {"map_location": "cpu"}):
        with pytest.raises(UsageError, match="a generator of cuda cannot be one of this device"):
            vs.load_state(tmp_path / "c", **options)
    assert vs.load_state(tmp_path / "c", exclude="w") == {}


def test_the_hint_for_a_module_leads_to_a_checkpoint(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    for function in (vs.save, vs.save_state):
        with pytest.raises(UsageError) as caught:
            function(tmp_path / "c", net)
        assert "state_dict()" in str(caught.value)
        assert "varstore.adapters" in str(caught.value)
    vs.save(tmp_path / "a", net.state_dict())
    vs.save_state(tmp_path / "b", net.state_dict())
    vt.save(tmp_path / "c", net)
