"""Save pytrees."""

from __future__ import annotations

from typing import Any, Unpack

from varstore.adapters.jax.trees import state_of
from varstore.disk.read.checkpoint import Checkpoint
from varstore.model.options import Path, StateOptions
from varstore.training.state import save_state
from varstore.values.arguments import checked

__all__ = ["save"]


@checked
def save(path: Path, tree: Any, **save_options: Unpack[StateOptions]) -> Checkpoint:
    """Save a pytree; variables are named by their path, such as ``params/Dense_0/kernel``.

    Arrays that are sharded over the devices of this process are saved whole, and so are those that every process of a
    program has whole.

    Args:
        path: a path that does not exist, or an empty directory; see `varstore.save`.
        tree: the pytree.
        save_options: the options of `varstore.save`.

    Raises:
        UsageError: a leaf is not data.
        UnsupportedDtype: an array is spread over processes, or has a type that the format cannot store.
        CheckpointExists, OutOfSpace, StorageError: see `varstore.save`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varstore.adapters.jax import save
        >>> save("params", {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}).names
        ('dense/kernel', 'dense/bias')
    """
    return save_state(path, state_of(tree), **save_options)
