"""Settings of Sphinx, which makes web pages of the documentation (`make docs`)."""

project = "remoe"
html_title = "remoe"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "plans/README.md", "remoe_cli/function/kernel/README.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
myst_heading_anchors = 4  # as GitHub's pages have them, so that one link serves both
