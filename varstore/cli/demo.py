"""``varstore demo``: what varstore is for, shown on real data with OneFlow's interface.

A network of two layers, in plain numpy, learns to read handwritten digits and is saved. A second network with one more
layer loads the variables that both have, initializes the others, and is trained further while ``dense1`` is frozen. It
is saved next to the first, and its unchanged variables take no additional space.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import click
import numpy as np

import varstore as flow
from varstore.cli.listing import print_listing
from varstore.cli.output import print_report
from varstore.text.escape import one_line
from varstore.text.hints import plural

__all__ = ["demo"]

STEP = "System-Train-TrainStep-train_job"  # OneFlow's name for the number of training steps
CLASSES = 10
HIDDEN = 64
BATCH = 32
RATE = 0.02
MOMENTUM = 0.9


@click.command(short_help="Train, save, fine-tune and inspect a small model in DIRECTORY.")
@click.argument("directory", type=click.Path())
def demo(directory: str) -> None:
    """Train a small model on handwritten digits, save it in DIRECTORY, and fine-tune a larger one from it.

    Writes DIRECTORY/mlp_models_1 and DIRECTORY/mlp_ext_models_1, which must not exist, and shows the files. It takes a
    few seconds. Its data comes with scikit-learn (pip install varstore[demo]); nothing is downloaded.

    \b
    Examples:
      varstore demo /tmp/demo
    """
    first = os.path.join(directory, "mlp_models_1")
    extended = os.path.join(directory, "mlp_ext_models_1")
    digits = load_digits()

    print_title("1. Train dense1 and dense2, and save them")
    with flow.Session():
        network = Network(Dense("dense1", 64, HIDDEN), Dense("dense2", HIDDEN, CLASSES))
        network.train(digits, epochs=10)
        flow.checkpoint.save(first, attributes={"accuracy": network.accuracy(digits)})

    print_title("2. Add dense3, load the other layers, freeze dense1, train further, and save")
    with flow.Session():
        layers = [Dense("dense1", 64, HIDDEN), Dense("dense2", HIDDEN, CLASSES), Dense("dense3", CLASSES, CLASSES)]
        network = Network(*layers)
        report = flow.load_variables(flow.checkpoint.get(first))
        print_report(report, ok=True)
        layers[0].freeze()
        network.train(digits, epochs=10)
        flow.checkpoint.save(extended, base=first, attributes={"accuracy": network.accuracy(digits)})

    print_title("3. What is on the disk")
    print_tree(directory)
    print_meta(os.path.join(extended, "dense3-weight", "meta"))
    for path in (first, extended):
        click.echo(f"\n$ varstore ls {one_line(path)}")
        print_listing(flow.open(path))
    click.echo(f"\n$ varstore verify {one_line(first)} {one_line(extended)}")
    for path in (first, extended):
        verified = flow.verify(path)
        print_report(verified, ok=verified.ok)


class Dense:
    """A fully connected layer, ``x @ weight.T + bias``, and the gradients of its last call."""

    def __init__(self, name: str, inputs: int, units: int) -> None:
        glorot, zeros = flow.glorot_uniform_initializer(), flow.zeros_initializer()
        self.weight = flow.get_variable(f"{name}-weight", shape=(units, inputs), initializer=glorot)
        self.bias = flow.get_variable(f"{name}-bias", shape=(units,), initializer=zeros)
        self.velocities = [np.zeros(self.weight.shape, np.float32), np.zeros(self.bias.shape, np.float32)]

    def freeze(self) -> None:
        """Do not change the layer any more."""
        self.weight.trainable = self.bias.trainable = False

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Return the layer's output, of shape (batch, units)."""
        self.x = x
        y: np.ndarray = x @ self.weight.numpy().T + self.bias.numpy()
        return y

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """Take the gradient of the loss with respect to the output, and return that with respect to the input."""
        self.gradients = [gradient.T @ self.x, gradient.sum(axis=0)]
        by_input: np.ndarray = gradient @ self.weight.numpy()
        return by_input

    def update(self) -> None:
        """Take a step of gradient descent with momentum; ``numpy()`` is the live array, changed in place."""
        for variable, velocity, gradient in zip((self.weight, self.bias), self.velocities, self.gradients, strict=True):
            if variable.trainable:
                velocity *= MOMENTUM
                velocity -= RATE * gradient
                variable.numpy()[...] += velocity


class Network:
    """Layers in sequence with a ReLU after the first, and the number of training steps."""

    def __init__(self, *layers: Dense) -> None:
        self.layers = layers
        self.step = flow.get_variable(STEP, (1,), flow.int64, flow.zeros_initializer(flow.int64))

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Return a score per image and class, of shape (images, 10)."""
        first, *others = self.layers
        x: np.ndarray = np.maximum(first.forward(images), 0)
        for layer in others:
            x = layer.forward(x)
        return x

    def train(self, digits: Digits, *, epochs: int) -> None:
        """Train in mini-batches; the loss is the cross-entropy of a softmax."""
        rng = np.random.default_rng(0)
        for epoch in range(1, epochs + 1):
            losses = [self.train_on(images, labels) for images, labels in mini_batches(digits, rng)]
            if epoch in (1, epochs):
                step, loss, score = self.step.numpy()[0], np.mean(losses), self.accuracy(digits)
                click.echo(f"epoch {epoch:>2}  step {step:>3}  loss {loss:.3f}  test accuracy {score:.1%}")

    def train_on(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Take a training step, and return the loss before it."""
        rows = np.arange(len(labels))
        scores = self.scores(images)
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        loss = float(-np.log(probabilities[rows, labels]).mean())

        gradient = probabilities.copy()
        gradient[rows, labels] -= 1
        gradient /= len(labels)
        first, *others = self.layers
        for layer in reversed(others):
            gradient = layer.backward(gradient)
        first.backward(gradient * (others[0].x > 0))
        for layer in self.layers:
            layer.update()
        self.step.numpy()[0] += 1
        return loss

    def accuracy(self, digits: Digits) -> float:
        """Return the fraction of the test images that are classified correctly."""
        return float((self.scores(digits.test_images).argmax(axis=1) == digits.test_labels).mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class Digits:
    """Images, as rows of 64 numbers from 0 to 1, and the digits that they show."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def mini_batches(digits: Digits, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all training images and labels in random order, in batches."""
    order = rng.permutation(len(digits.train_images))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        yield digits.train_images[rows], digits.train_labels[rows]


def load_digits() -> Digits:
    """Return the 1,797 handwritten digits of 8 × 8 pixels that come with scikit-learn, a fifth of them for testing.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise flow.errors.MissingDependency(
            "the demo needs scikit-learn for its data", hint="install it: pip install varstore[demo]"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:360], order[360:]
    return Digits(
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )


def print_title(title: str) -> None:
    """Print the title of the next part."""
    click.echo(click.style(f"\n{title}", bold=True))


def print_tree(directory: str) -> None:
    """Print all files below a directory with their sizes, and which of them two checkpoints share."""
    click.echo(one_line(directory))
    for folder, folders, files in os.walk(directory):
        folders.sort()
        depth = folder.removeprefix(directory).count(os.sep)
        if depth:
            click.echo(f"{'    ' * depth}{one_line(os.path.basename(folder))}/")
        for file in sorted(files):
            status = os.stat(os.path.join(folder, file))
            shared = "  (one file in both checkpoints)" if status.st_nlink > 1 else ""
            click.echo(f"{'    ' * (depth + 1)}{one_line(file)}  {plural(status.st_size, 'byte')}{shared}")


def print_meta(path: str) -> None:
    """Print a ``meta`` file as ``cat`` does."""
    click.echo(f"\n$ cat {one_line(path)}")
    with open(path, encoding="utf-8") as file:
        click.echo(file.read(), nl=False)
