"""# Other systems' files

`varstore.read` opens a file or folder of another system as a lazy mapping of names to arrays, `varstore.write` writes
one, and `varstore.convert` converts one to another, one tensor at a time. The system itself need not be installed.
Code that a file asks for is never run: varstore reads pickles itself, and takes nothing but data from them.

    >>> model = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    >>> vs.write("model.pt", {"model": model, "epoch": 3})
    <Written 'model.pt': torch>
    >>> file = vs.read("model.pt")
    >>> file
    <torch file 'model.pt': 2 tensors>
    >>> list(file)
    ['model/w', 'model/b']

`[]` returns an array that is not read yet. It has numpy's operators and methods, which read it. If the format stores
plain bytes, an index reads only what it needs. `state()` reads the whole nested object, with all its other values;
`state(framework="torch")` gives tensors, as `torch.load` does.

    >>> file["model/w"]
    <LazyArray 'model/w': float32 [2, 3], 24 bytes>
    >>> file["model/w"][0]
    array([1., 1., 1.], dtype=float32)
    >>> file.state()["epoch"]
    3

## Formats

`read` detects the format from the content. `write` and `convert` take it from the suffix of the path, or from
`format=`.

| format | suffixes | read | written |
|---|---|---|---|
| varstore | none | checkpoint directories, the latest step of a `CheckpointManager` | checkpoint directories |
| huggingface | none | folders of `save_pretrained` and diffusers, the cache of the Hub | folders |
| safetensors | `.safetensors`, `.safetensors.index.json` | files, and models in several files with an index | both |
| torch | `.pt`, `.pth`, `.bin`, `.tar`, `.pt2`, Lightning's `.ckpt` | files, programs, distributed folders | files |
| numpy | `.npz`, `.npy` | files of `numpy.savez` and `numpy.save` | both |
| oneflow | `.of` | folders and files of `flow.save`, folders of variables | folders |
| oneflow-legacy | none | as varstore, without a manifest | folders that OneFlow 0.9 loads whole |
| paddle | `.pdparams`, `.pdopt`, `.pdckpt`, `.pdiparams` | `paddle.save`, `jit.save`, `save_vars` | files, programs |
| megengine | `.mge`, `.pkl` | files of `megengine.save`, dumped graphs | files, graphs |
| mindspore | `.ckpt`, `.mindir` | `save_checkpoint`, also encrypted, `export` to MINDIR | files, not encrypted |
| onnx | `.onnx` | the initializers of a model | a copy of a model with other initializers |
| orbax | `.orbax` | folders of Orbax, steps with several items, the latest step of a manager | no |
| zarr | `.zarr` | trees of versions 2 and 3, folders and zip archives | trees |

A file or folder that is not a checkpoint is named in the error: a pointer of Git LFS, the page of a failed download, a
compressed file, GGUF, HDF5, TensorFlow, or the folder of a run that accelerate or DeepSpeed saved in several files,
whose parts can be opened.

Zarr does not write chunks that are all fill value, and chunks that are absent are read as that. `absent_chunks` of the
opened file counts them; `vs.read(path, absent="error")` refuses them.

Writing Zarr requires the package `zarr`, reading chunks compressed with blosc, lz4 or zstd `numcodecs`, reading Orbax's
databases `tensorstore`, and reading encrypted MindSpore files `cryptography`.

## What is kept

| format | kept besides names and arrays | left out |
|---|---|---|
| varstore | nested state of `varstore.save_state`, attributes | |
| safetensors | metadata, other names of tied tensors | |
| torch | nested state; tied tensors and views; which arrays were tensors | devices, gradients, code of modules |
| numpy | | arrays of Python objects, which are pickles |
| oneflow | nested state, tied tensors | code of modules |
| paddle | nested state; names of parameters, in `attributes` | programs |
| megengine | nested state; scales of quantised values, as attributes of the array | code of modules, graphs |
| mindspore | parameters that are text, in `state()` | |
| onnx | shapes of sparse tensors, in `state()` | the graph, initializers of inner graphs |
| orbax | nested state; custom metadata | text |
| zarr | attributes of the root group | attributes of other groups and arrays |

An object of a class that varstore does not know, such as the arguments of a script, is an `Opaque` leaf of `state()`: a
record of the class's name and of what the object would be made of. `file.unknown` lists these names. The guide on files
from strangers is `varstore.formats.binary`.

A module that was pickled as a whole is read as its state dict. Of a program of TorchScript all tensors are read, by
their names as attributes, because it does not say which of them are parameters; of a frozen one, the constants `c0`,
`c1` and so on. Of an exported program (`.pt2`) the state dict is read. A sparse tensor of PyTorch, and a tensor of a
wrapper subclass, is read as a dict of its parts, and a quantised one as integers with the scale in `attributes`.

## Converting

A target that can store nested state gets it. Any other target gets the arrays, and the result names what was left out.
`Opaque` objects are never written.

    >>> done = vs.convert("model.pt", "model.safetensors")
    >>> done.names, done.left_out
    (('model/w', 'model/b'), ('epoch',))
    >>> done = vs.convert("model.pt", "checkpoint")
    >>> vs.load_state("checkpoint")["epoch"]
    3

A checkpoint remembers which arrays of a file of torch were tensors: where torch is installed, `vs.load_state` gives
them for `load_state_dict`, and converting back to a file of torch changes no type.

Names are chosen and renamed as in `varstore.load`; the guide is `varstore.model`. `dtype=` converts all floating-point
tensors.

    >>> done = vs.convert("model.pt", "half.npz", include="model/*", rename={"model": ""}, dtype="float16")
    >>> sorted(np.load("half.npz").items())
    [('b', array([0., 0., 0.], dtype=float16)), ('w', array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float16))]

If the target does not have a type, or cannot store a value, that is an error before anything is written.

A folder for `from_pretrained` has one file, or an index with several, and the configuration of the model if it is
given:

    >>> vs.write("pretrained", model, format="huggingface", shard_bytes=5_000_000_000, config={"model_type": "bert"})
    <Written 'pretrained': huggingface>
    >>> vs.read("pretrained")
    <huggingface file 'pretrained': 2 tensors>

An ONNX file is a program. To change its values, write a copy of it: `vs.write("new.onnx", values, model="old.onnx")`
replaces the initializers that `values` names. So does `vs.write("new.pdiparams", values, model="old")` for a program of
Paddle, with its other methods and the files beside it, and `vs.write("new.pt2", values, model="old.pt2")` for one that
PyTorch exported; MindSpore's are called `.mindir`, and graphs that MegEngine dumped `.mge`.

## For OneFlow

OneFlow reads a checkpoint of varstore: `flow.load` takes each folder for a variable. But it lists one level of folders
only, so a name with `/` is lost, with a warning; it warns of the manifest; and it loads nothing at all if one variable
is bfloat16, int16, uint16, uint32, uint64, complex, or a type that only varstore has. For a folder that OneFlow 0.9
loads whole, write the format `oneflow-legacy`. It replaces `/` in names, and says which types must be cast.

    >>> vs.write("for-oneflow", {"net/w": np.ones(3, np.float32), "net/n": np.ones(1, np.uint16)},
    ...          format="oneflow-legacy", separator="-", dtype={"uint16": "int32"})
    <Written 'for-oneflow': oneflow-legacy>
    >>> list(vs.open("for-oneflow"))
    ['net-n', 'net-w']
"""
