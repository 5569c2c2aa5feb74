"""The site: `sphinx-build -W --keep-going docs site`, with the extra `docs` installed."""

import flax_dropout_cell

project = "flax_dropout_cell"
author = "The flax_dropout_cell authors"
project_copyright = author
release = version = flax_dropout_cell.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["results"]
default_role = "literal"  # docstrings write code between single backticks
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Only pages with a kernel in their front matter are notebooks: the tutorials.
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

html_theme = "sphinx_book_theme"
html_title = "flax_dropout_cell"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"show_navbar_depth": 1, "navbar_persistent": []}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def drop_last_blank_line(app, name, source):
    """A block of doctests ends with a blank line, for doctest's sake; nobody need see it."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def setup(app):
    app.connect("source-read", drop_last_blank_line)
