r"""# Choosing and renaming variables

`varstore.load`, `varstore.load_into`, `varstore.convert` and `Checkpoint.select` take the same three options. Names go
in as the source has them; first `include` and `exclude` choose, then `rename` changes what was chosen.

The examples use this checkpoint:

    >>> layers = {f"net.layer{i}.{kind}": np.full(2, i, np.float32) for i in (1, 2) for kind in ("weight", "bias")}
    >>> checkpoint = vs.save("model", {**layers, "head.weight": np.ones(3, np.float32)})

## Patterns

`include` and `exclude` are glob patterns on whole names, one or several. `*` matches any text, separators too; `?`
matches one character, and `[ab]` one of several. Case counts. A name always matches itself, brackets and all.

    >>> list(checkpoint.select(include="*.weight"))
    ['net.layer1.weight', 'net.layer2.weight', 'head.weight']
    >>> list(checkpoint.select(include=["net.layer2.*", "head*"], exclude="*.bias"))
    ['net.layer2.weight', 'head.weight']

A pattern of `include` that matches nothing is an error, which shows the most similar names. One of `exclude` may match
nothing.

## Prefixes

A dict renames prefixes. A prefix ends where a part of the name ends, that is before `/`, `.` or `-`, so that `"net"`
does not match `network.bias`. The longest prefix that matches counts. An empty replacement also removes the
separator, None drops the variables, and the prefix `""` matches every name that no other prefix matches.

    >>> list(vs.load("model", rename={"net": "backbone", "head": None}))
    ['backbone.layer1.weight', 'backbone.layer1.bias', 'backbone.layer2.weight', 'backbone.layer2.bias']
    >>> list(vs.load("model", include="net.layer1.*", rename={"net": ""}))
    ['layer1.weight', 'layer1.bias']

## Regular expressions and functions

A list of (regular expression, replacement) applies `re.sub` with each of them, in order. A function takes a name and
returns the new one, or None to drop the variable.

    >>> list(vs.load("model", include="*.bias", rename=[(r"layer(\d+)", r"block/\1"), (r"\.", "/")]))
    ['net/block/1/bias', 'net/block/2/bias']
    >>> list(vs.load("model", rename=lambda name: name.upper() if "head" in name else None))
    ['HEAD.WEIGHT']

Two variables that would get one name are an error, which names both.

## Loading into a model that differs

`varstore.load_into` reports what it did. A load of nothing is an error. It shows what was found, and where few names
match, it suggests the rename that helps most.

    >>> model = {name.replace("net", "encoder"): np.zeros(2, np.float32) for name in layers}
    >>> vs.load_into(model, "model")
    Traceback (most recent call last):
        ...
    varstore.errors.VariableMismatch: model -> targets: nothing is loaded: 4 missing, 5 unexpected
      missing         4  encoder.*    (not in the source: keeps its values)
      unexpected      4  net.*        (not in the target)
      unexpected      1  head.weight  (not in the target)
    Try rename={'net.': 'encoder.'}: 4 of 4 names would match
    >>> report = vs.load_into(model, "model", exclude="head.*", rename={"net": "encoder"})
    >>> len(report.raise_for("missing", "unexpected").loaded)
    4
"""
