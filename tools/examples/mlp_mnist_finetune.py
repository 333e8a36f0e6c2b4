"""Load a network, add a layer, and train on: the second script of OneFlow's document on loading and saving models.

    python tools/examples/mlp_mnist_finetune.py

It reads ``mlp_models_1``, which ``mlp_mnist_origin.py`` wrote, and writes ``mlp_ext_models_1``. As in the document, the
checkpoint is loaded before the variables are declared: its values wait in the session until `get_variable` takes them,
and ``dense3``, which the checkpoint does not have, keeps its initializer.
"""

import varstore as flow
from varstore.cli.demo import Dense, Network, load_digits


def mlp_ext() -> Network:
    """Declare the variables of three layers, and the step; the first layer is not trained any more."""
    dense1 = Dense("dense1", 64, 64)
    dense1.freeze()
    return Network(dense1, Dense("dense2", 64, 10), Dense("dense3", 10, 10))


if __name__ == "__main__":
    flow.config.enable_legacy_model_io(False)
    print(flow.load_variables(flow.checkpoint.get("./mlp_models_1")))
    mlp_ext().train(load_digits(), epochs=10)
    flow.checkpoint.save("./mlp_ext_models_1")
    print("saved ./mlp_ext_models_1")
