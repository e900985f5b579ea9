"""The Markdown of a paper's README as HTML that refers to nothing outside the page."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import markupsafe
from markdown_it import MarkdownIt


@functools.cache
def _renderer() -> MarkdownIt:
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    # the page refers to nothing outside itself: a link shows its text, and its address as text
    renderer.add_render_rule("link_open", lambda *_: "")
    renderer.add_render_rule("link_close", _address)
    renderer.add_render_rule("image", lambda self, tokens, index, *_: tokens[index].content)
    return renderer


def _address(_renderer: Any, tokens: Sequence[Any], index: int, *_: Any) -> str:
    opened = next(token for token in reversed(tokens[:index]) if token.type == "link_open")
    address = str(opened.attrs.get("href", "")).split("://")[-1].removeprefix("#")
    text = "".join(token.content for token in tokens[tokens.index(opened) : index])
    return "" if not address or address in text else f" ({markupsafe.escape(address)})"


def html(text: str) -> str:
    """The text as HTML; raw HTML in it stays text, and a link shows its address as text."""
    return (
        _renderer()
        .render(text)
        .replace("<table>", '<div class="scroll"><table>')
        .replace("</table>", "</table></div>")
    )
