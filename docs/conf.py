"""The site: `sphinx-build -W --keep-going docs site`, with the extra `docs` installed."""

import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference
from sphinx.util import inspect

import flax_dropout_cell

# The address of the repository, such as "https://github.com/OWNER/flax_dropout_cell". If it is set,
# each page has a link to the repository and one to edit the page, and links to examples and tests
# lead there. If not, the site has a page for each of these files.
REPOSITORY = ""
BRANCH = "main"

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
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]

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
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": BRANCH,
        "path_to_docs": "docs",
        "use_repository_button": True,
        "use_edit_page_button": True,
        "use_issues_button": True,
    }
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

ROOT = Path(__file__).resolve().parents[1]


def drop_last_blank_line(app, name, source):
    """A block of doctests ends with a blank line, for doctest's sake; nobody need see it."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def name_functions(app, what, name, obj, options, signature, return_annotation):
    """Signatures with names for `<PjitFunction of ..>` and `<class ..>`, which Sphinx cannot read.

    The arguments that every linen module takes are left out. NNX's modules have a metaclass that
    hides their arguments, so these are read from `__init__`.
    """
    if what == "class" and (signature or "").startswith("(*args"):
        arguments = inspect.signature(obj.__init__, bound_method=True)
        signature = inspect.stringify_signature(
            arguments, show_return_annotation=False, unqualified_typehints=True
        )

    def named(text):
        text = re.sub(r", parent: [^=]*= <[^>]*_Sentinel object[^>]*>, name: [^=]*= None", "", text)
        text = re.sub(r"<PjitFunction of (<function .*?>)>", r"\1", text)
        text = re.sub(r"<function (?:\w+\.)*(?:<locals>\.)?(\w+)[^>]*>", r"\1", text)
        text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("<factory>", "{}")
        dtype = r"str \| type\[\S*Any\] \| \S*dtype \| \S*SupportsDType \| \S*Any"
        text = re.sub(dtype, "DTypeLike", text)  # aliases come spelt out
        array = (
            r"\S*Array \| \S*ndarray \| \S*bool\w* \| \S*number \| bool \| int \| float \| complex"
        )
        text = re.sub(array, "ArrayLike", text)
        return re.sub(r"(\S*Initializer) \| \S*Callable\[\[\.\.\.\], \S*Any\]", r"\1", text)

    return signature and named(signature), return_annotation and named(return_annotation)


def show_files(app, doctree):
    """Links to files of the repository show them, instead of downloading."""
    if app.builder.format != "html":
        return
    for link in list(doctree.findall(download_reference)):
        path = Path(app.env.relfn2path(link["reftarget"], app.env.docname)[1]).resolve()
        file = path.relative_to(ROOT).as_posix()
        if REPOSITORY:
            target = f"{REPOSITORY}/blob/{BRANCH}/{file}"
        else:
            app.env.repository_files = getattr(app.env, "repository_files", set()) | {file}
            target = app.builder.get_relative_uri(app.env.docname, f"files/{file}")
        link.replace_self(nodes.reference("", "", *link.children, refuri=target))


def file_pages(app):
    """A page for each file of the repository that the docs link to."""
    for file in sorted(getattr(app.env, "repository_files", ())):
        text = (ROOT / file).read_text()
        language = {".py": "python", ".json": "json", ".yml": "yaml"}.get(Path(file).suffix, "text")
        shown = app.builder.highlighter.highlight_block(text, language, linenos=False)
        yield f"files/{file}", {"title": file, "body": f"<h1>{file}</h1>{shown}"}, "page.html"


def setup(app):
    app.connect("source-read", drop_last_blank_line)
    app.connect("autodoc-process-signature", name_functions)
    app.connect("doctree-read", show_files, priority=400)  # before Sphinx collects downloads
    app.connect("html-collect-pages", file_pages)
