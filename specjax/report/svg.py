"""A matplotlib figure as SVG in the page: its own ids, the page's colours and fonts, and a title for screen readers."""

import io
import re
import warnings
from collections.abc import Mapping
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from specjax.report.marks import clean

_SVG = "http://www.w3.org/2000/svg"
# Stand-ins that matplotlib can parse -> what the page's style sheet says of them, in light and in dark.
INK, MUTED, RULE = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0102{16 + i:02x}" for i in range(8))
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"} | {
    colour: f"var(--s{i})" for i, colour in enumerate(SERIES)
}
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: selected, searched, in the page's font
    "svg.hashsalt": "specjax",  # the same report is the same file
    "text.parse_math": False,  # a name may have dollars
    "font.size": 11,
}


def of(figure: Figure, key: str, label: str, titles: Mapping[str, str]) -> str:
    """The `<svg>` element of a figure.

    Args:
      figure: drawn in the colours of this file, with a transparent background.
      key: the prefix of its ids, unique on the page.
      label: what it shows, for screen readers.
      titles: gid of an artist -> the text shown when the pointer rests on it.
    """
    held = io.StringIO()
    with rc_context(SETTINGS), warnings.catch_warnings():
        # The page's reader has the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(held, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(held.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):  # the style would be the whole page's
                parent.remove(child)
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": clean(label)})
    for element in list(root.iter()):
        if said := titles.get(element.get("id", "")):
            _title(element, said)
        _mend(element, key)
    _title(root, label)
    return ElementTree.tostring(root, encoding="unicode")


def _title(element: ElementTree.Element, text: str) -> None:
    title = ElementTree.Element(f"{{{_SVG}}}title")
    title.text = clean(text)
    element.insert(0, title)


def _mend(element: ElementTree.Element, key: str) -> None:
    """Rewrites one element: unique ids, the page's colours, inherited fonts."""
    for name, value in list(element.attrib.items()):
        bare = name.rpartition("}")[2]
        if bare == "id":
            element.set(name, f"{key}-{value}")
        elif bare == "href":  # without the namespace, which HTML has no need of
            del element.attrib[name]
            element.set("href", f"#{key}-{value.removeprefix('#')}")
        elif "url(#" in value:
            element.set(name, value.replace("url(#", f"url(#{key}-"))
        else:
            element.set(name, " ".join(value.split()))
    style = re.sub(r"font-family: [^;]*;?|font: [^;]*?(?=[\d.]+px)", "", element.get("style", ""))
    if style:
        element.set("style", re.sub("|".join(_VARIABLES), lambda hit: _VARIABLES[hit[0]], style).strip())
