"""Mend what other extensions put into the pages."""

import re

from sphinx.application import Sphinx


def mend(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Mend one page before it is written."""
    context["script_files"] = [s for s in context.get("script_files", []) if not is_thebe(s)]
    body = join_printed(mark_tables(mend_citations(context.get("body", ""))))
    context["body"] = join_chapters(join_marks(join_units(link_drawings(body))))
    for side in ("prev", "next"):
        if context.get(side):
            context[side] = {**context[side], "title": join_number(context[side]["title"])}


def is_thebe(script) -> bool:
    """Whether a script is of Thebe, which the book does not use: it is put in twice, and the second is an error."""
    return "thebe" in f"{script} {getattr(script, 'attributes', '')}".lower()


def mend_citations(body: str) -> str:
    """Docutils calls the bibliography a list whose children are no list items, which confuses screen readers."""
    return body.replace(' role="list" class="citation-list"', ' class="citation-list"').replace(
        ' role="doc-biblioentry"', ""
    )


def mark_tables(body: str) -> str:
    """Give printed tables a class: on a phone they are moved sideways, while other printed lines are wrapped.

    A table is an output with three lines or more in which two gaps or more, of two spaces or more, hold columns apart.
    (One gap alone also stands in sentences whose numbers are set right.)
    """

    def mark(found: re.Match) -> str:
        columns = re.findall(r"^.*\S {2,}\S.* {2,}\S", re.sub(r"<[^>]+>", "", found[3]), flags=re.MULTILINE)
        return f"{found[1]}{' tf-table' if len(columns) >= 3 else ''}{found[2]}{found[3]}</pre>"

    return re.sub(r'(<div class="output stream[^"]*)("[^>]*>.*?<pre>)(.*?)</pre>', mark, body, flags=re.DOTALL)


def join_units(body: str) -> str:
    """Keep a unit on the line of its number, by a space that does not break; keep names such as GPT-2 on one line.

    The same goes for dates, a point of a few numbers, and the number behind an equals sign.
    A product breaks behind its dot.
    """
    unit = re.compile(r"(?:(?<=\d)|^) (?=(?:%|[kKMGT]i?B|[GT]B/s|[GT]FLOP/s|s|ms|µs|ns)(?![\w/]))")
    pieces = re.split(r"(<(pre|code|script|style)\b.*?</\2>|<[^>]+>)", body, flags=re.DOTALL)
    result = re.compile(r"(?<= =) (?=[−-]?\d)|(?<=\d) (?=· [−-]?[\d(])")
    point = re.compile(r"\([−-]?[\d.]{1,6}(?:, [−-]?[\d.]{1,6}){1,4}\)")
    whole = re.compile(r"(?<![\w-])((?i:top-[kp]|min-p)|[nk]-th|[A-Za-z]{2,9}-V?\d\w*|\d{4}-\d\d-\d\d)(?![\w-])")

    def join(text: str) -> str:
        for gap in (unit, result):
            text = gap.sub("\N{NO-BREAK SPACE}", text)
        text = point.sub(lambda numbers: numbers[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
        return whole.sub(r'<span class="tf-joined">\1</span>', text)

    pieces[::3] = map(join, pieces[::3])
    return "".join(text or "" for i, text in enumerate(pieces) if i % 3 != 2)


def join_marks(body: str) -> str:
    """Keep brackets and full stops on the line of their short formula: a browser would break between them."""
    formula = r'<span class="math notranslate nohighlight">[^<]{1,36}</span>'
    near = re.compile(rf"([(\[“]*)({formula})([)\]”,.;:?!]*)")
    return near.sub(lambda m: f'<span class="tf-joined">{m[0]}</span>' if m[1] or m[3] else m[0], body)


def join_number(title: str) -> str:
    """Keep the number of a chapter or a part on the line of its title's first word."""
    return re.sub(r"^(\d+\.|Part [IV]+\.) ", "\\1\N{NO-BREAK SPACE}", title)


def join_chapters(body: str) -> str:
    """Keep the number of a chapter beside its title in every link to it."""
    link = re.compile(r'(<a class="reference internal"[^>]*>(?:<span class="[^"]*">)?)(\d+\. [^<]*)')
    return link.sub(lambda found: found[1] + join_number(found[2]), body)


def join_printed(body: str) -> str:
    """Keep a printed token on one line with the space before its word, and an arrow in a comment whole."""

    def joined(found: re.Match) -> str:
        return re.sub(r"' [^\s'<]{0,16}'", r'<span class="tf-joined">\g<0></span>', found[0])

    body = re.sub(r'<div class="output stream[^"]*"[^>]*>.*?</pre>', joined, body, flags=re.DOTALL)
    comment = re.compile(r'(<span class="(?:sd|c1)">)([^<]*-&gt;[^<]*)')
    arrow = '<span class="tf-joined">-&gt;</span>'
    return comment.sub(lambda found: found[1] + found[2].replace("-&gt;", arrow), body)


def link_drawings(body: str) -> str:
    """Make each SVG of a cell a link to the drawing alone, as MyST-NB does with a PNG: there a phone can zoom in."""
    drawing = re.compile(r'(?<!">)<img (?=[^>]*src="([^"]+_images/[^"]+\.svg)")[^>]*/>')
    return drawing.sub(lambda img: f'<a class="reference internal image-reference" href="{img[1]}">{img[0]}</a>', body)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx, after the extensions that are mended."""
    app.connect("html-page-context", mend, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
