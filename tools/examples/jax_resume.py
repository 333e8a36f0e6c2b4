"""Train a network of Flax with Optax, stop, and resume; then fine-tune its body under another head.

    python tools/examples/jax_resume.py

A state comes back as the classes that it had, because it is loaded into one of the same structure. The run that is
resumed ends as one that never stopped.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from varstore.adapters import jax as checkpoints

optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.01, 20)))


class Network(nn.Module):
    """Two layers."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.classes, name="head")(nn.relu(nn.Dense(32, name="body")(x)))


net = Network(3)


def begin() -> tuple[Any, Any]:
    """Return parameters, and the optimizer's state for them."""
    params = net.init(jax.random.key(0), jnp.zeros((1, 16)))["params"]
    return params, optimizer.init(params)


@jax.jit
def update(params: Any, opt_state: Any, step: int) -> tuple[Any, Any, jax.Array]:
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (64, 16))

    def loss_of(params: Any) -> jax.Array:
        logits = net.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, x[:, :3].argmax(1)).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def train(params: Any, opt_state: Any, steps: range) -> tuple[Any, Any]:
    for step in steps:
        params, opt_state, loss = update(params, opt_state, step)
    print(f"step {steps.stop}: loss {loss:.4f}")
    return params, opt_state


if __name__ == "__main__":
    params, opt_state = train(*begin(), range(10))
    checkpoints.save("checkpoint", {"params": params, "opt_state": opt_state, "step": 10})
    expected = train(params, opt_state, range(10, 20))

    params, opt_state = begin()
    state = checkpoints.load("checkpoint", like={"params": params, "opt_state": opt_state, "step": 0})
    assert jax.tree.structure(state["opt_state"]) == jax.tree.structure(opt_state)
    resumed = train(state["params"], state["opt_state"], range(state["step"], 20))
    assert all(map(jnp.array_equal, jax.tree.leaves(resumed), jax.tree.leaves(expected)))
    print("resumed as if never stopped")

    wider = Network(5).init(jax.random.key(2), jnp.zeros((1, 16)))["params"]
    tuned, report = checkpoints.load_into(
        wider, "checkpoint", include="params/body/*", rename={"params/": ""}, missing="head/*"
    )
    print(report)
    assert jnp.array_equal(tuned["body"]["kernel"], state["params"]["body"]["kernel"])
