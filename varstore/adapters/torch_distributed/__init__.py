"""Load checkpoints into state that many processes hold together: FSDP2, tensor parallelism, DTensors on any mesh.

The checkpoint is an ordinary one, with whole tensors: it does not depend on the number of ranks or on the mesh, and
`varstore.load` reads it in one process.
"""

from varstore.adapters.torch_distributed.reader import Reader
from varstore.adapters.torch_distributed.reading import load

__all__ = ["Reader", "load"]
