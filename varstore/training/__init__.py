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
`varstore.KeepEverySteps`, `varstore.OnePerMinutes`, `varstore.Pinned` and `varstore.KeepIf`. `|` combines them: a step
is kept if any of them wants it.

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

`varstore.adapters` restore modules, optimizers and pytrees of PyTorch, JAX, Lightning and Hugging Face in place.
"""
