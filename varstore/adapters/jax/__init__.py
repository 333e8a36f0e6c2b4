"""Save pytrees of JAX, including those of Flax and Optax, and restore them into a given structure.

Plain Python containers keep their types. Any other node of a pytree is saved as a dict of its fields, and gets its type
back when it is restored into a pytree of the same structure. Arrays move between the host and their devices one at a
time.

A process reads only the parts of arrays that its own devices hold: each process of a program calls `load_sharded`, or
`load` with a pytree whose leaves have shardings, on any mesh, whatever mesh the checkpoint was saved on.
"""

from varstore.adapters.jax.loading import load, load_into, load_sharded
from varstore.adapters.jax.saving import save
from varstore.adapters.jax.trees import state_of

__all__ = ["load", "load_into", "load_sharded", "save", "state_of"]
