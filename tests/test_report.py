"""Pages: whole in one file, escaped, the same bytes each time."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from medclr.report import Page, cell_text

HOSTILE = "<script>alert('x')</script> & \"so\" on"


class Reader(HTMLParser):
    """Collects tags with their attributes, text, and complains of what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def figure() -> Figure:
    drawn = Figure(figsize=(2, 1))
    drawn.subplots().imshow(np.eye(3))
    return drawn


def page() -> Page:
    made = Page(HOSTILE, HOSTILE)
    made.tiles([(1234567, HOSTILE)])
    made.warnings([HOSTILE])
    made.section(HOSTILE, HOSTILE)
    made.table([HOSTILE, "n"], [[HOSTILE, 1.5], ["b", None]], HOSTILE)
    made.figure(figure(), HOSTILE)
    made.figure(figure(), "a photograph", "png")
    return made


def test_whatever_is_given_is_text_and_every_tag_is_closed():
    read = Reader(page().html())
    assert read.open == []
    assert "script" not in {tag for tag, _ in read.tags}
    assert sum(HOSTILE in text for text in read.text) == 11  # the window's title too
    assert [attributes["alt"] for tag, attributes in read.tags if tag == "img"] == [HOSTILE, "a photograph"]


def test_nothing_comes_from_outside_and_pictures_carry_no_metadata():
    html = page().html()
    sources = [attributes["src"] for tag, attributes in Reader(html).tags if tag == "img"]
    assert [source.split(",")[0] for source in sources] == ["data:image/svg+xml;base64", "data:image/png;base64"]
    assert not re.search(r"https?:|url\(|@import|<link", html)
    svg, png = (base64.b64decode(source.split(",")[1]) for source in sources)
    assert b"dc:date" not in svg
    assert b"matplotlib" not in svg.lower().replace(b"matplotlib.axis", b"")
    assert b"tEXt" not in png


def test_a_picture_that_was_written_before_is_held_as_it_is(tmp_path):
    figure().savefig(tmp_path / "a.png")
    made = Page("t")
    made.picture(tmp_path / "a.png", HOSTILE)
    (image,) = (attributes for tag, attributes in Reader(made.html()).tags if tag == "img")
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "a.png").read_bytes()
    assert image["alt"] == HOSTILE


def test_the_same_page_is_the_same_bytes(tmp_path):
    page().write(tmp_path / "a.html")
    page().write(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "prefers-color-scheme: dark" in (tmp_path / "a.html").read_text()


def test_only_columns_of_numbers_stand_to_the_right():
    tags = Reader(page().html()).tags
    assert [attributes.get("class") for tag, attributes in tags if tag == "td"] == [None, "n", None, "n"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (0.12345678, "0.1235"), (2.0, "2"), (12345.6, "12,346"), (None, ""), ("1e5", "1e5")],
)
def test_numbers_are_written_as_people_write_them(value, text):
    assert cell_text(value) == text
