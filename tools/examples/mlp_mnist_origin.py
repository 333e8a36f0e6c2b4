"""Train a network of two layers and save it: the first script of OneFlow's document on loading and saving models.

    python tools/examples/mlp_mnist_origin.py

It writes ``mlp_models_1`` in the working directory. Order and names are the document's, and `flow` is varstore. The
layers, in plain numpy, and the data, handwritten digits in the place of MNIST, are those of ``varstore demo``; the
network counts its training steps in the variable ``System-Train-TrainStep-train_job``.
"""

import varstore as flow
from varstore.cli.demo import Dense, Network, load_digits


def mlp() -> Network:
    """Declare the variables of two layers, and the step."""
    return Network(Dense("dense1", 64, 64), Dense("dense2", 64, 10))


if __name__ == "__main__":
    flow.config.enable_legacy_model_io(False)
    mlp().train(load_digits(), epochs=10)
    flow.checkpoint.save("./mlp_models_1")
    print("saved ./mlp_models_1")
