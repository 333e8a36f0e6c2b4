"""Take the backbone of somebody's PyTorch file, give it a new head, fine-tune, stop and resume.

    python tools/examples/torch_new_head.py

The file holds what such files do: the arguments of a script beside the weights, a prefix of its own in the names, and a
head for other classes. It is read without running code of it. The run that is resumed ends as one that never stopped.
"""

import argparse

import torch

from varstore.adapters import torch as checkpoints


class Classifier(torch.nn.Module):
    """A backbone and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
        self.head = torch.nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def pretrain() -> None:
    """Write the file that somebody gives away."""
    weights = {f"module.encoder.{name}": value for name, value in Classifier(1000).backbone.state_dict().items()}
    weights["module.fc.weight"] = torch.zeros(1000, 32)
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=0.1), "epoch": 90}, "pretrained.pt")


def begin() -> tuple[Classifier, torch.optim.Optimizer]:
    """Return a model of three classes on the pretrained backbone, and its optimizer."""
    net = Classifier(3)
    report = checkpoints.load_into(
        net,
        "pretrained.pt",
        include="state_dict/module.encoder.*",
        rename={"state_dict/module.encoder.": "backbone."},
        missing="head.*",
    )
    print(report)
    return net, torch.optim.AdamW(net.parameters(), 0.01)


def train(net: Classifier, optimizer: torch.optim.Optimizer, epochs: range) -> None:
    for epoch in epochs:
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(epoch))
        loss = torch.nn.functional.cross_entropy(net(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epochs.stop}: loss {loss.item():.4f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    pretrain()
    net, optimizer = begin()
    train(net, optimizer, range(3))
    checkpoints.save("checkpoint", {"model": net, "optimizer": optimizer, "epoch": 3})
    train(net, optimizer, range(3, 6))
    expected = net.state_dict()

    net = Classifier(3)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    state = checkpoints.load("checkpoint", map_location="cpu")
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(net, optimizer, range(state["epoch"], 6))
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    print("resumed as if never stopped")
