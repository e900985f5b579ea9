"""SVG text of the drawings: made small for files, and ready to stand inside a page."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from html import escape


def compact(svg: str) -> str:
    """The drawing as matplotlib wrote it, in a third of the bytes.

    Shorter numbers, one style for a row of equal markers, plain fonts.
    """
    svg = re.sub(r"\s*<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: 'DejaVu Sans', system-ui, sans-serif", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
    svg = re.sub(r' (?:d|x|y|width|height|points|transform)="[^"]*"', _shortened, svg)
    svg = re.sub(r">\s+<", "><", svg)

    def hoist(group: re.Match[str]) -> str:
        uses = group.group(2)
        styles = set(re.findall(r' style="([^"]*)"', uses))
        if len(styles) != 1 or uses.count("<use ") < 2:
            return group.group(0)
        return f'<g{group.group(1)} style="{styles.pop()}">' + re.sub(r' style="[^"]*"', "", uses) + "</g>"

    return re.sub(r"<g((?: clip-path=\"[^\"]*\")?)>((?:<use [^>]*/>)+)</g>", hoist, svg)


def _shortened(attribute: re.Match[str]) -> str:
    text = re.sub(
        r"-?\d+\.\d{3,}", lambda n: f"{float(n.group()):.2f}".rstrip("0").rstrip("."), attribute.group()
    )
    return re.sub(r"\s*\n([A-Za-z\"])", r"\1", text)


def inline(svg: str, name: str, title: str, colours: Mapping[str, str]) -> str:
    """The drawing as an element of a page: own ids, no outside names, colours that follow the page's scheme.

    svg: what `compact` returned. name: what sets the figure apart on the page. colours: colour in the drawing
    -> what CSS shall use in its place.
    """
    body = svg[svg.index("<svg") :]
    box = re.findall(r'viewBox="([^"]*)"', body)[0]
    body = body[body.index(">") + 1 :]
    # ids are numbered behind a short digest of the figure's name, so that they are unique on the page
    referred = dict.fromkeys(re.findall(r'(?:url\(|href=")#([\w-]+)', body))
    key = f"f{zlib.crc32(name.encode()):x}"
    ids = {name: f"{key}-{number}" for number, name in enumerate(referred)}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{ids[m.group(1)]}"' if m.group(1) in ids else "", body)
    body = re.sub(r'xlink:href="#([^"]*)"', lambda m: f'href="#{ids[m.group(1)]}"', body)
    body = re.sub(r"url\(#([^)]*)\)", lambda m: f"url(#{ids[m.group(1)]})", body)
    # the page's own background shows through, and its style sheet sets the font and colour of text
    body = re.sub(r'<path d="[^"]*" style="fill: #ffffff"/>', "", body)
    body = re.sub(r" ?font-family: [^;\"]*;?", "", body)
    for colour, replacement in colours.items():
        body = body.replace(colour, replacement)
    body = _without_plain_groups(body)
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(title, quote=True)}">{body}'


def _without_plain_groups(body: str) -> str:
    """Without `<g>` elements that have no attribute, and so no meaning."""
    kept: list[bool] = []

    def group(tag: re.Match[str]) -> str:
        if tag.group().startswith("<g"):
            kept.append(tag.group() != "<g>")
            return tag.group() if kept[-1] else ""
        return tag.group() if kept.pop() else ""

    return re.sub(r"<g(?: [^>]*)?>|</g>", group, body)
