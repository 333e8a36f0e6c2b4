"""# Coming from another framework

A page for each framework shows what its own documentation teaches about saving and loading, and how it is done with
varstore: the document's snippets left, varstore's right. All of them run as tests, and what is not possible says why.

- `varstore.coming_from_torch`
- `varstore.coming_from_mindspore`
- `varstore.coming_from_paddle`
- `varstore.coming_from_megengine`
- `varstore.coming_from_oneflow`

`bash tools/docs.sh` builds them; the sources are the files ``tests/documents/*.md``.
"""
