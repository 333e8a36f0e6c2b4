"""What a manager asks of the ranks that share it; an adapter has the processes of its framework do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from varstore.model.options import LoadOptions
from varstore.training.background import PendingSave
from varstore.training.tensors import MapLocation

__all__ = ["Ranks"]

Result = TypeVar("Result")


class Ranks(Protocol):
    """The processes that share a manager; every method is called on all of them."""

    def decided(self, decide: Callable[[], Result]) -> Result:
        """Return on every rank what a function returns on the first one, or raise what it raises there."""

    def save(self, path: str, state: Any, *, attributes: Mapping[str, Any], overwrite: bool, durable: bool) -> None:
        """Save a state that the ranks hold together."""

    def save_async(
        self, path: str, state: Any, *, attributes: Mapping[str, Any], overwrite: bool, durable: bool
    ) -> PendingSave:
        """Begin a save that goes on in the background."""

    def restored(self, path: str, map_location: MapLocation, like: Any, options: LoadOptions) -> Any:
        """Load a checkpoint into `like`, and return that; without it, load the state whole on every rank."""
