"""# Training: save, keep, resume

A training loop needs three things: a state that restores everything, a rule for what to save and what to keep, and a
way to start again after an interruption.

## One state

`varstore.save_state` takes nested dicts, lists, numbers, text and arrays, among them the state dicts of models and
optimizers. Everything comes back with the type that it had. Nothing is pickled.

    >>> state = {"model": {"w": np.zeros(3)}, "optimizer": {"lr": 0.1, "momentum": [np.zeros(3)]}, "step": 0}
    >>> checkpoint = vs.save_state("before", state)
    >>> checkpoint.names
    ('model/w', 'optimizer/momentum/0')
    >>> vs.load_state("before")["optimizer"]
    {'lr': 0.1, 'momentum': [array([0., 0., 0.])]}

## Save and keep

A `varstore.CheckpointManager` saves each step in a folder of its own, links variables that did not change, and deletes
what its policies no longer want. With `background=True`, `save` copies the arrays and returns; a thread writes them.

    >>> def train(state):
    ...     state["model"]["w"] += 0.5
    ...     state["step"] += 1
    ...     return abs(float(state["model"]["w"][0]) - 2)  # the loss
    >>> keep = vs.Latest(2) | vs.Best("loss")
    >>> with vs.CheckpointManager("run", keep=keep, background=True) as manager:
    ...     while state["step"] < 7:
    ...         loss = train(state)
    ...         pending = manager.save(state["step"], state, metrics={"loss": loss})
    >>> [saved.step for saved in manager.all()]
    [4, 6, 7]
    >>> print(manager.prune(dry_run=True))
             4  kept     best 1 by min loss
             6  kept     latest 2
             7  kept     latest 2

Policies for saving are `varstore.EverySteps`, `varstore.EverySeconds`, `varstore.AtSteps` and `varstore.SaveIf`: pass
one as `save_when`, and ask `should_save`. Policies for keeping are `varstore.Latest`, `varstore.Best`,
`varstore.KeepEverySteps`, `varstore.OnePerMinutes`, `varstore.Pinned` and `varstore.KeepIf`. `|` combines them, and so
does a list: a step is kept if any of them wants it. `varstore.Best` needs a mode, "min" or "max", unless the metric's
name ends as one of a loss or an error does.

Whatever the policies say, the highest step is not deleted, nor the step that was just saved, nor a step whose metrics
are not known, such as one that another program put there. Each deletion is logged. If the directory holds steps that a
new `keep` does not want, making the manager logs a warning that names them, before anything is deleted.

Optimizers are often twice as large as the model. `keep_parts` keeps them in fewer steps:

    >>> parts = {"optimizer/*": vs.Latest()}
    >>> with vs.CheckpointManager("small_run", keep=vs.Latest(2), keep_parts=parts) as small:
    ...     for step in (1, 2):
    ...         pending = small.save(step, state)
    >>> [vs.open(saved).names for saved in small.all()]
    [('model/w',), ('model/w', 'optimizer/momentum/0')]

## Resume

After an interruption, make the manager again. It removes what a crashed save left, and finds the complete checkpoints.

    >>> manager = vs.CheckpointManager("run", keep=keep)
    >>> if manager.latest():
    ...     state = manager.restore()
    >>> state["step"], state["model"]["w"]
    (7, array([3.5, 3.5, 3.5]))
    >>> manager.best().step
    4

If the latest step is damaged, `restore()` logs a warning and tries the one before it. ``restore(step)`` gives that step
or an error. `CheckpointManager.others` says what is wrong with the folders that are not whole steps.

    >>> import os
    >>> os.remove("run/step-7/snapshot_done")
    >>> manager.restore()["step"]
    6
    >>> list(manager.others())
    ['step-7']
    >>> pending = manager.save(7, state, metrics={"loss": 1.5}, overwrite=True)
    >>> manager.restore()["step"]
    7

## Step back

To go on from an earlier step, remove the later ones with `CheckpointManager.rewind`:

    >>> print(manager.rewind(6))
             4  kept     not later than step 6
             6  kept     not later than step 6
             7  deleted  later than step 6

If you save a step that is lower than one in the directory without doing so, numbers no longer tell old from new. So a
warning is logged, and from then on every step that is saved is kept, by this manager and those after it, until `rewind`
is called:

    >>> for step in (1, 2, 3):
    ...     pending = manager.save(step, state, metrics={"loss": 1 / step})
    >>> [saved.step for saved in manager.all()]
    [1, 2, 3, 4, 6]
    >>> rewound = manager.rewind(3)
    >>> pending = manager.save(4, state, metrics={"loss": 0.5})
    >>> [saved.step for saved in manager.all()]
    [3, 4]

`varstore.adapters` restore modules, optimizers and pytrees of PyTorch, JAX, Lightning and Hugging Face in place.
"""
