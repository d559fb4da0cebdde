"""Mend what other extensions put into the pages."""

from sphinx.application import Sphinx


def mend(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Mend one page before it is written."""
    context["script_files"] = [s for s in context.get("script_files", []) if not is_thebe(s)]
    context["body"] = mend_citations(context.get("body", ""))


def is_thebe(script) -> bool:
    """Whether a script is of Thebe, which the book does not use: it is put in twice, and the second is an error."""
    return "thebe" in f"{script} {getattr(script, 'attributes', '')}".lower()


def mend_citations(body: str) -> str:
    """Docutils calls the bibliography a list whose children are no list items, which confuses screen readers."""
    return body.replace(' role="list" class="citation-list"', ' class="citation-list"').replace(
        ' role="doc-biblioentry"', ""
    )


def setup(app: Sphinx) -> dict:
    """Register with Sphinx, after the extensions that are mended."""
    app.connect("html-page-context", mend, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
