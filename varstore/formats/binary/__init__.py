"""# Opening files from strangers

Anyone can make a checkpoint and call it a model. varstore opens such files and folders with three promises. They hold
for `vs.open`, `vs.read`, `vs.load_state`, `vs.convert`, `vs.verify` and the command line.

**No code runs.** A pickle is a program, and PyTorch's files contain one. varstore has an interpreter of its own for
them, which imports nothing and calls nothing but constructors of plain data. A file that asks for what has no use but
to run code is an `varstore.errors.UnsafeContent`.

    >>> import pickle
    >>> class Payload:
    ...     def __reduce__(self):
    ...         return exec, ("print('this runs when the file is loaded')",)
    >>> with open("payload.mge", "wb") as file:
    ...     pickle.dump({"w": Payload()}, file)
    >>> vs.read("payload.mge")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    varstore.errors.UnsafeContent: payload.mge: byte ...: this pickle would call builtins.exec("print('this runs ...

Other names that varstore does not know, such as the class of the arguments of a script, are not imported either. The
object becomes an `Opaque`: a record of the name, the arguments and the state that the file gives for it, which can do
nothing. `vs.read(path, unknown="error")` refuses such files too.

    >>> import argparse
    >>> with open("arguments.mge", "wb") as file:
    ...     pickle.dump({"w": np.ones(3), "args": argparse.Namespace(lr=0.1)}, file)
    >>> file = vs.read("arguments.mge")
    >>> file.unknown
    (('argparse', 'Namespace', 1),)
    >>> file.state()["args"], file.state()["args"].state
    (<Opaque argparse.Namespace>, {'lr': 0.1})

**It stays in its place.** Names and links in a file do not lead out of the folder that was opened. A folder of another
system is walked first: links, pipes and devices are refused. The links of a snapshot in the cache of the Hugging Face
Hub are followed, because they lead to the files of the same repository.

**It costs what it is worth.** Opening a file takes at most 64 MiB of memory plus 64 times its size, and time in
proportion to its size. Its values may take at most 64 MiB plus four times its size. A file of compressed zeros can
be legitimate and exceed that; `limit` permits more:

    >>> np.savez_compressed("zeros.npz", w=np.zeros(80_000_000, np.uint8))
    >>> vs.read("zeros.npz")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    varstore.errors.UnsafeContent: zeros.npz: variable 'w': the values in this file are out of proportion to its size...
    >>> vs.read("zeros.npz", limit=80_000_000)
    <npz file 'zeros.npz': 1 tensor>

## What that does not mean

- **A file that varstore opens is not therefore safe for another program.** What varstore leaves alone, such as the code
  of a module that was pickled as a whole, runs in `torch.load(path, weights_only=False)`. Convert the file, and give
  the copy to other programs: `vs.convert("model.pt", "model.safetensors")`.
- The values may be anything. A model can be trained to misbehave, and no reader sees that.
- Digests find damage, not forgery. Compare a file with a digest or signature that its author published.
- The libraries that decode chunks of zarr arrays (`numcodecs`) and Orbax's databases (`tensorstore`) are not written
  for hostile input. varstore compares all sizes with what they must be before a library sees the bytes. Databases of
  Orbax are opened by tensorstore itself: open a stranger's in a container, or ask for a checkpoint without a database.

## Where to work

Run `varstore`, the installed command, rather than `python -m varstore` in a folder that you downloaded: Python imports
modules from the current folder first, so a file named `click.py` there would run. The same holds for scripts of your
own and for `python -c`. With `python -P` or `PYTHONSAFEPATH=1`, Python leaves the current folder out.

Report what breaks a promise as `.github/SECURITY.md` says.
"""
