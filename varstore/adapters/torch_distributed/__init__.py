"""Save and load state that many processes hold together: FSDP2, tensor parallelism, DTensors on any mesh.

```python
from varstore.adapters.torch_distributed import load, save

save(f"run/step-{step}", {"model": model, "optimizer": optimizer_state, "step": step})  # on every rank

state = {"model": model, "optimizer": optimizer_state, "step": 0}
report = load("run/step-1000", state)
```

The checkpoint is an ordinary one, with whole tensors: it does not depend on the number of ranks or on the mesh, and
`varstore.load` reads it in one process. Each rank writes and reads its own parts, and nothing is pickled. `Writer` and
`Reader` are for programs that call ``torch.distributed.checkpoint`` themselves.
"""

from varstore.adapters.torch_distributed.reader import Reader
from varstore.adapters.torch_distributed.reading import load
from varstore.adapters.torch_distributed.saving import save, save_async
from varstore.adapters.torch_distributed.writer import Writer

__all__ = ["Reader", "Writer", "load", "save", "save_async"]
