"""Types that a tree names are looked up among what torch has, without anything that torch would import for a name."""

from types import ModuleType

import pytest

from varstore.training import kinds


def test_a_name_of_a_type_does_not_import_a_submodule(monkeypatch):
    def imported(name: str) -> None:
        pytest.fail(f"torch was asked for {name}")

    torch = ModuleType("torch")
    torch.__getattr__ = imported  # type: ignore[method-assign]
    torch.dtype, torch.float32 = type, float  # type: ignore[attr-defined]
    monkeypatch.setattr(kinds, "framework_named", lambda _name: torch)
    assert kinds.VALUES["torch.dtype"](["float32"]) is float
    with pytest.raises(ValueError, match="not a type of torch"):
        kinds.VALUES["torch.dtype"](["onnx"])
