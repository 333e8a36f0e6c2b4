"""Pictures of a checkpoint for a browser: a report in one file, and a viewer that computes what is opened.

Both show one page, of the HTML, CSS and JavaScript in the folder ``page``, with data in JSON. What a file says reaches
the page as text only: names and attributes come from strangers, see `varstore.view.page`. Who may ask a viewer is told
in `varstore.view.server`.
"""
