"""Record the names of the files that MindSpore's ModelCheckpoint leaves, for a table of configurations.

Run it with the python of an environment that has MindSpore (`tools/make_envs.sh mindspore`); it prints JSON:

    .envs/mindspore/bin/python tools/make_mindspore_names.py > tests/data/mindspore/model_checkpoint_names.json

A small network is trained. Only the clock is simulated: it advances by the seconds of a row with each step, and each
file gets its time, so that windows of minutes pass immediately.
"""

import json
import os
import sys
import tempfile
import types
from typing import Any

import mindspore
import numpy as np
from mindspore import nn
from mindspore.dataset import NumpySlicesDataset
from mindspore.train import Callback, CheckpointConfig, Model, ModelCheckpoint
from mindspore.train.callback import _checkpoint

STEPS, SECONDS, MAX, MINUTES = (
    "save_checkpoint_steps",
    "save_checkpoint_seconds",
    "keep_checkpoint_max",
    "keep_checkpoint_per_n_minutes",
)

# configuration, seconds per step, runs (epochs, steps per epoch), prefix of each run
ROWS: list[tuple[dict[str, Any], float, list[tuple[int, int]], list[str]]] = [
    ({}, 1, [(2, 4)], ["CKP"]),
    ({STEPS: 3}, 1, [(2, 4)], ["CKP"]),
    ({STEPS: 3}, 1, [(3, 3)], ["CKP"]),
    ({STEPS: 5}, 1, [(4, 3)], ["net"]),
    ({STEPS: 100}, 1, [(2, 4)], ["CKP"]),
    ({STEPS: 1, MAX: 1}, 1, [(1, 5)], ["CKP"]),
    ({STEPS: 2, MAX: 3}, 1, [(3, 5)], ["CKP"]),
    ({STEPS: 2, MAX: 0}, 1, [(3, 5)], ["CKP"]),
    ({STEPS: 2, MAX: None}, 1, [(3, 5)], ["CKP"]),
    ({STEPS: 1, MAX: 20}, 1, [(3, 5)], ["CKP"]),
    ({STEPS: 2, SECONDS: 1}, 10, [(2, 5)], ["CKP"]),
    ({STEPS: 0, SECONDS: 30}, 10, [(2, 5)], ["CKP"]),
    ({STEPS: None, SECONDS: 30}, 10, [(2, 5)], ["CKP"]),
    ({STEPS: None, SECONDS: 25, MAX: 2}, 10, [(3, 5)], ["CKP"]),
    ({STEPS: 0, SECONDS: 1000}, 10, [(2, 5)], ["CKP"]),
    ({STEPS: 0, SECONDS: 0}, 10, [(2, 5)], ["CKP"]),
    ({STEPS: None, SECONDS: None, MAX: 3}, 10, [(2, 5)], ["CKP"]),
    ({STEPS: 1, MAX: 0, MINUTES: 2}, 25, [(3, 5)], ["CKP"]),
    ({STEPS: 1, MAX: 0, MINUTES: 1}, 30, [(3, 5)], ["CKP"]),
    ({STEPS: 1, MAX: None, MINUTES: 5}, 70, [(4, 5)], ["CKP"]),
    ({STEPS: 2, MAX: 0, MINUTES: 3}, 45, [(4, 5)], ["CKP"]),
    ({STEPS: 1, MAX: 0, MINUTES: 1}, 200, [(2, 4)], ["CKP"]),
    ({STEPS: 1, MAX: 2, MINUTES: 1}, 200, [(2, 4)], ["CKP"]),
    ({STEPS: 0, SECONDS: 40, MAX: 0, MINUTES: 3}, 25, [(4, 6)], ["CKP"]),
    ({STEPS: 2, MAX: 0, MINUTES: 0}, 1, [(2, 5)], ["CKP"]),
    ({STEPS: 2, MAX: 2}, 1, [(2, 4)] * 3, ["CKP"] * 3),
    ({STEPS: 3}, 1, [(2, 4)] * 4, ["CKP", "CKP", "CKP_1", "CKP"]),
    ({STEPS: 3}, 1, [(1, 4)] * 4, ["a", "ab", "a", "a-b"]),
    ({STEPS: 3}, 1, [(1, 4)] * 4, ["net", "net1", "net", "net_7"]),
    ({STEPS: 3}, 1, [(1, 4)] * 3, ["net_7", "net", "net"]),
    ({STEPS: 1, MAX: 3}, 1, [(1, 1), (1, 1)], ["CKP", "CKP"]),
    ({STEPS: 0, SECONDS: 0, MAX: 0, MINUTES: 0}, 1, [], []),
    ({STEPS: None, SECONDS: None, MAX: None, MINUTES: None}, 1, [], []),
    ({STEPS: None, SECONDS: 0, MAX: 0, MINUTES: None}, 1, [], []),
    ({STEPS: None, SECONDS: 0, MAX: 0, MINUTES: 1}, 1, [], []),
    ({STEPS: -1}, 1, [], []),
    ({MAX: -1}, 1, [], []),
    ({STEPS: 1.5}, 1, [], []),
    ({STEPS: True}, 1, [], []),
    ({SECONDS: "1"}, 1, [], []),
]


class Clock(Callback):  # type: ignore[misc]
    """Advances the clock before the callback runs, and sets the times of the files after it."""

    def __init__(self, seconds: float, directory: str) -> None:
        super().__init__()
        self.now, self.seconds, self.directory = 1_700_000_000.0, seconds, directory
        self.stamped: set[str] = set()

    def tick(self, _context: Any = None) -> None:
        self.now += self.seconds

    def stamp(self, _context: Any = None) -> None:
        for name in set(os.listdir(self.directory)) - self.stamped:
            os.utime(os.path.join(self.directory, name), (self.now, self.now))
        self.stamped = set(os.listdir(self.directory))


class Before(Callback):  # type: ignore[misc]
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.step_end = clock.tick


class After(Callback):  # type: ignore[misc]
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.step_end = self.end = clock.stamp


def record(config: dict[str, Any], seconds: float, runs: list[tuple[int, int]], prefixes: list[str]) -> dict[str, Any]:
    """Return one row of the table: the names and the resolved settings, or that the settings are refused."""
    row: dict[str, Any] = {"config": config, "seconds": seconds, "runs": runs, "prefixes": prefixes}
    try:
        settings = CheckpointConfig(**config)
    except (TypeError, ValueError) as error:
        return {**row, "refused": type(error).__name__}
    row["policy"] = settings.get_checkpoint_policy()
    row["policy"].pop("saved_network", None)
    row["left"] = []
    with tempfile.TemporaryDirectory() as directory:
        clock = Clock(seconds, directory)
        _checkpoint.time = types.SimpleNamespace(time=lambda: clock.now)
        for (epochs, steps), prefix in zip(runs, prefixes, strict=True):
            data = NumpySlicesDataset({"x": np.ones((steps, 2), "f4"), "y": np.ones((steps, 1), "f4")}, shuffle=False)
            net = nn.Dense(2, 1)
            model = Model(net, nn.MSELoss(), nn.SGD(net.trainable_params(), 0.1))
            callback = ModelCheckpoint(prefix=prefix, directory=directory, config=CheckpointConfig(**config))
            model.train(
                epochs, data.batch(1), callbacks=[Before(clock), callback, After(clock)], dataset_sink_mode=False
            )
            row["left"].append(sorted(name[:-5] for name in os.listdir(directory) if name.endswith(".ckpt")))
    return row


def main() -> None:
    """Print the table."""
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE, device_target="CPU")
    table = [record(*row) for row in ROWS]
    lines = ",\n".join(json.dumps(row) for row in table)
    sys.stdout.write(f'{{"mindspore": "{mindspore.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
