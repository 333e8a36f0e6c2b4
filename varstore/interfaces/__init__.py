"""# Coming from another framework

A page for each framework shows what its own documentation teaches about saving and loading, and how it is done with
varstore: the document's snippets left, varstore's right. All of them run as tests, and what is not possible says why.

They are the files ``tests/documents/*.md``, for torch, mindspore, paddle, megengine and oneflow, and pages of the
reference, which ``bash tools/docs.sh`` builds.

The modules here are the interfaces that such programs know: `interfaces.oneflow`, whose functions are also
`varstore`'s own, and `interfaces.mindspore`.
"""
