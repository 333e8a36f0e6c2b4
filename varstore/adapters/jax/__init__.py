"""Save pytrees of JAX, including those of Flax and Optax, and restore them into a given structure.

Plain Python containers keep their types. Any other node of a pytree is saved as a dict of its fields, and gets its type
back when it is restored into a pytree of the same structure. Arrays move from their devices to the host one at a time,
and back at most 64 MiB at a time, or one.

In a program of several processes, each writes the shards of its own devices with `save_sharded`: together they make one
ordinary checkpoint. With `load_sharded`, or `load` with a pytree whose leaves have shardings, each reads only the parts
that its own devices hold, on any mesh, whatever mesh the checkpoint was saved on.
"""

from varstore.adapters.jax.loading import load, load_into, load_sharded
from varstore.adapters.jax.saving import save, save_sharded
from varstore.adapters.jax.trees import state_of

__all__ = ["load", "load_into", "load_sharded", "save", "save_sharded", "state_of"]
