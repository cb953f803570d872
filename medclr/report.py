"""Pages for people: one HTML file that holds its pictures, asks for nothing from outside and runs no script.

What is given as text is escaped; pictures carry no metadata and the same input gives the same bytes.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Literal

from matplotlib import rc_context
from matplotlib.figure import Figure

import medclr
from medclr import files

STYLE = """
:root { color-scheme: light dark; --ink: #1b2733; --soft: #5b6b7a; --line: #d9e0e6; --paper: #fff; --card: #f6f8fa;
  --warn: #fff5e0; --edge: #e0a100; --link: #0b6e8f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf0; --soft: #9fb0bf; --line: #33414e; --paper: #12181e;
  --card: #1a222a; --warn: #33290f; --edge: #c08f1a; --link: #6cc0dc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.2rem 1.2rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.3rem 0 0; }
.tiles div { flex: 1 1 8rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .9rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.warnings { list-style: none; margin: 1.2rem 0 0; padding: 0; }
.warnings li { background: var(--warn); border-left: 4px solid var(--edge); border-radius: 4px; padding: .5rem .9rem;
  margin: .5rem 0; }
.scroll { overflow-x: auto; margin: .9rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .3rem 1.1rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; } .n { text-align: right; white-space: nowrap; }
figure { margin: 1.1rem 0; } figcaption { margin-top: .4rem; max-width: 46rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: .5rem; }
footer { margin-top: 2.6rem; color: var(--soft); font-size: .82rem; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""

Cell = str | int | float | None


class Page:
    """A page that is built from top to bottom, then written.

    Args:
        title: stands above, and in the window's title.
        subtitle: one line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="soft">{escape(subtitle)}</p>')

    def tiles(self, facts: Sequence[tuple[Cell, str]]) -> None:
        """Large numbers side by side, each with a word below."""
        tiles = "".join(f"<div><b>{escape(cell_text(value))}</b>{escape(word)}</div>" for value, word in facts)
        self._parts.append(f'<div class="tiles">{tiles}</div>')

    def warnings(self, sentences: Sequence[str]) -> None:
        """What the reader should not miss; nothing if there is nothing."""
        if sentences:
            items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
            self._parts.append(f'<ul class="warnings">\n{items}\n</ul>')

    def section(self, heading: str, text: str = "") -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(heading)}</h2>")
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> None:
        """A table; a column of numbers (None is an empty cell) stands to the right."""
        numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]

        def line(tag: str, cells: Sequence[Cell]) -> str:
            right = (' class="n"' if number else "" for number in numeric)
            marked = (f"<{tag}{r}>{escape(cell_text(cell))}</{tag}>" for cell, r in zip(cells, right, strict=True))
            return f"<tr>{''.join(marked)}</tr>"

        head = f"<caption>{escape(caption)}</caption>" if caption else ""
        body = "\n".join(line("td", row) for row in rows)
        table = f"<table>{head}\n<thead>{line('th', header)}</thead>\n<tbody>\n{body}\n</tbody></table>"
        self._parts.append(f'<div class="scroll">{table}</div>')

    def figure(self, figure: Figure, caption: str, kind: Literal["svg", "png"] = "svg") -> None:
        """A picture and its caption, which also stands for it where it cannot be seen.

        Args:
            figure: matplotlib's.
            caption: what is to be seen.
            kind: svg for lines and words, png for photographs.
        """
        data = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        with rc_context({"svg.hashsalt": "medclr"}):
            figure.savefig(data, format=kind, dpi=150, metadata=metadata, bbox_inches="tight", facecolor="white")
        self._image(data.getvalue(), "image/svg+xml" if kind == "svg" else "image/png", caption)

    def picture(self, path: Path, caption: str) -> None:
        """A PNG that was written before, and its caption."""
        self._image(path.read_bytes(), "image/png", caption)

    def _image(self, data: bytes, mime: str, caption: str) -> None:
        image = base64.b64encode(data).decode()
        self._parts.append(
            f'<figure><img src="data:{mime};base64,{image}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """The whole document."""
        body = "\n".join(self._parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
            f"<footer>medclr {medclr.__version__}</footer>\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Write it, atomically."""
        files.write_text(path, self.html())


def cell_text(cell: Cell) -> str:
    """Numbers as people write them: thousands parted, four digits of a fraction."""
    if cell is None:
        return ""
    if isinstance(cell, float) and not cell.is_integer():
        return f"{cell:,.4g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return f"{int(cell):,}" if isinstance(cell, float | int) else cell
