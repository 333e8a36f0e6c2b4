"""# Coming from another framework

How to save and load a model: first with the calls that each framework's documentation shows, then with varstore.

## PyTorch

`varstore.adapters.torch` also loads straight into the memory of modules and optimizers, and reports what it loaded. A
file that `torch.save` wrote is brought over by `vs.convert("checkpoint.tar", "checkpoint")`; `vs.load_state` then gives
what `torch.load` gave.

```python torch
torch.save({"epoch": 3, "model": net.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.tar")
state = torch.load("checkpoint.tar", map_location="cpu")
net.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
```

```python torch
vs.save_state("checkpoint", {"epoch": 3, "model": net.state_dict(), "optimizer": optimizer.state_dict()})
state = vs.load_state("checkpoint", map_location="cpu")
net.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
```

## MindSpore

```python mindspore
mindspore.save_checkpoint(net, "lenet.ckpt")
mindspore.load_param_into_net(net, mindspore.load_checkpoint("lenet.ckpt"))
from mindspore.train import CheckpointConfig, ModelCheckpoint

callback = ModelCheckpoint("lenet", "models", CheckpointConfig(save_checkpoint_steps=100))
```

```python mindspore
vs.save("lenet", {parameter.name: parameter for parameter in net.get_parameters()})
vs.load_param_into_net(net, vs.load_checkpoint("lenet"))
from varstore.adapters.mindspore import ModelCheckpoint

callback = ModelCheckpoint("lenet", "models", vs.CheckpointConfig(save_checkpoint_steps=100))
```

`vs.load_checkpoint` also opens a ``.ckpt`` file. `varstore.adapters.mindspore` has a `load_checkpoint` that gives
Parameters, and MindSpore's callback `ModelCheckpoint`, for ``model.train(…, callbacks=…)``.

## PaddlePaddle

```python paddle
paddle.save(net.state_dict(), "linear.pdparams")
net.set_state_dict(paddle.load("linear.pdparams"))
```

```python paddle
vs.save("linear", net.state_dict())
net.set_state_dict(vs.load("linear"))
```

A file of `paddle.save` is opened as it is, and so is Paddle's prefix: ``vs.read("example.model/linear")`` finds the
parameters of `paddle.jit.save`, or the pair of `paddle.Model.save` as ``model`` and ``optimizer``. In conversions,
parameters keep the names that Paddle has for them besides their structured names.

## MegEngine

State dicts of MegEngine hold NumPy arrays. MegEngine runs on Python 3.8, which is too old for varstore: let each save
files for the other. `vs.convert("checkpoint.mge", "checkpoint")` and `vs.convert("checkpoint", "checkpoint.mge")` need
no MegEngine; a Tensor, such as a loss, comes back as one, and a whole module that was saved is read as its state dict.

```python megengine
megengine.save({"epoch": 3, "state_dict": net.state_dict(), "opt_state": optimizer.state_dict()}, "checkpoint.mge")
net.load_state_dict(megengine.load("checkpoint.mge")["state_dict"])
```

```python
net_state = {"fc.weight": np.ones((2, 3), np.float32)}  # net.state_dict()
vs.save_state("checkpoint", {"epoch": 3, "state_dict": net_state, "opt_state": {"step": 1}})
restored = vs.load_state("checkpoint")["state_dict"]  # for net.load_state_dict
```

## OneFlow

OneFlow's legacy checkpoints are the same directories. As in OneFlow, a script may load first and declare its variables
later: the values wait in the session until then. The two scripts of OneFlow's document on loading and saving models are
``tools/examples/mlp_mnist_origin.py`` and ``mlp_mnist_finetune.py``. What OneFlow 0.9 loads of a checkpoint, and the
format that it loads whole, is in the guide `varstore.formats`.

```python oneflow
flow.save(net.state_dict(), "oneflow_checkpoint")
net.load_state_dict(flow.load("oneflow_checkpoint"))
```

```python
flow.checkpoint.save("flow_checkpoint")
flow.load_variables(flow.checkpoint.get("flow_checkpoint"))
```
"""
