r"""A checkpoint as a Zarr group: zarr, xarray, dask and TensorStore read it as it lies there, without a copy.

```python
import zarr
from varstore.adapters.zarr import CheckpointStore

group = zarr.open_group(CheckpointStore("lenet"), mode="r")
group["conv1/weight"][3:5]
```

Nothing is written, and nothing about Zarr lies in the checkpoint. A variable is an array in chunks of at most 16 MiB,
which are computed from ``out`` when zarr asks for them; each is compared with its digest.

The path of an array is the variable's name. A name that is not a path of Zarr, such as one with ``\``, or that lies
below another variable, is replaced by the name of its folder, and the attribute ``varstore_name`` holds it. The
attributes of an array and of the root group are those of the variable and of the checkpoint. ``dimension_names`` are
``NAME_0``, ``NAME_1``, …, because xarray needs names. The fill value is NaN where the type has it, else 0; it is never
used, since no chunk is missing.

zarr does not have bfloat16, float8 and the other types of `ml_dtypes`. Opening a store registers those that no other
package has registered; `register_data_types` does it without a store.
"""

from varstore.adapters.zarr.data_types import register_data_types
from varstore.adapters.zarr.store import CheckpointStore
from varstore.adapters.zarr.tensorstore import tensorstore_spec

__all__ = ["CheckpointStore", "register_data_types", "tensorstore_spec"]
