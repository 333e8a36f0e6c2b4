"""# Graphs and variables together

`varstore.bundle` saves models with the variables that they use, so that a checkpoint can be run as it is.

    import torch, varstore as vs
    from varstore.adapters import onnx

    program = torch.onnx.export(net, (images,), dynamo=True, optimize=False)
    vs.bundle("run/step-0", net.state_dict(), graphs={"forward": program})
    (scores,) = onnx.session("run/step-0").run(None, {"x": images.numpy()})

The graph does not have the values: it takes them from the files of the variables. So they are on disk once, and each
later checkpoint with this graph shares what did not change. A manager keeps the graph in the steps of a fine-tuning:

    with vs.CheckpointManager("run") as manager:
        manager.save(1, net.state_dict(), graphs_from="run/step-0")

## What is bound

An initializer whose name is that of a variable, or becomes it with `rename=`, must equal the variable in shape, type
and every byte. Exporters compute new values under old names: that of PyTorch folds a BatchNorm into the layer before
it, unless it is called with `optimize=False`. Such a difference is an error. With `on_difference="inline"`, the value
stays in the graph; with `"add"`, it becomes a variable `ENTRY/NAME`. In both cases the graph cannot follow when the
variable changes, so a later save of it with another value of that variable is refused.

Small values (less than 1 KiB), types of less than a byte and integers of one dimension stay in the graph as copies,
because runtimes look for them there. Where such a variable changed, `graphs_from=` and `bundle(..., graphs=CHECKPOINT)`
write the graph again, with the new copy. `save` itself refuses a graph whose variables are not those that it was made
for.

## Where it runs

| program | how |
|---|---|
| onnxruntime | `varstore.adapters.onnx.session(path)`, from the files |
| onnx | `varstore.adapters.onnx.load_model(path)` |
| others | `varstore.export(path, "model.onnx")`, or `varstore export`: one file that needs nothing else |
| PyTorch | `varstore.export(path, "net.pt2")`, then `torch.export.load("net.pt2")` |
| Paddle | `varstore.export(path, "out/net")`, then `paddle.jit.load("out/net")`, or its predictor |
| OneFlow | from the checkpoint itself, or from what `varstore.export(path, "folder")` writes |
| MegEngine, MindSpore | `varstore.write("new.mge", checkpoint, model=checkpoint.files["net.mge"].path)` |

onnx from 1.21 on refuses to load values from a file with several names, and the files of checkpoints that share
variables have several. `onnx.load` itself opens a checkpoint that was saved with `links=False`: its files have one name
for good, because later checkpoints copy from it.

A graph that MegEngine dumped (`.mge`) or MindSpore exported (`.mindir`) has its values inside. Keep it with
`varstore.save(..., files={"net.mge": path})`: later checkpoints share it, and `write` makes a copy of it with their
values.

## Programs of PyTorch

A program that PyTorch 2.9 or later exported, or the path of one that `torch.export.save` wrote, is kept without the
weights that are variables:

    program = torch.export.export(net, (images,))
    vs.bundle("run/step-0", net.state_dict(), graphs={"forward": program})

It does not run from the checkpoint itself: `varstore.export` writes it with the values.

## Programs of Paddle and OneFlow

A program that `paddle.jit.save` or `save_inference_model` wrote is kept as it is, and bound by Paddle's names of its
parameters. Live tensors know these, and so do the files that `varstore.read` opens; for others, pass `rename=`. Several
methods of a layer are several entries:

    graphs = {"forward": "net.json", "another_forward": "net.another_forward.json"}
    vs.bundle("run/step-0", layer.state_dict(), graphs=graphs, include_only_used=True)

`model.mlir`, which OneFlow writes for an nn.Graph, is bound by the names of the folders. What OneFlow wrote has no
marker, so it is not a checkpoint yet; `varstore seal --complete PATH` makes it one, if all variables that the program
names are there and as long as they should be.

## Entries

`varstore show PATH` prints the entries with their inputs and outputs, and `varstore check PATH` runs each of them once.

## Safety

A graph is a program: run those of people whom you trust. Nothing in a graph is looked at when a checkpoint is opened.
Before a runtime gets it, its bytes are compared with their digests, and every place in it that refers to a file must
name exactly one whole variable of this checkpoint. `session` registers no custom operators, refuses graphs that ask for
what another file compiled, and runs what belongs to another user only with `trust=True`.
"""
