"""Reports: self-contained, complete, readable without the pictures, in any colours."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import pytest

from espalier.figures import style
from espalier.report.material import Material
from report_material import line, material, table, write

FIGURES = [
    "decisions.svg", "losses.svg", "quality.svg", "similarity-0.svg", "skipping.svg", "speed.svg", "training-0.svg",
    "training-layers.svg", "usage.svg",
]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("reports") / "abc.html", material())


class Reader(HTMLParser):
    """Collects tags, attributes and text; checks that tags close in order."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


def test_report_needs_nothing_from_outside(report: Path) -> None:
    reader = read(report)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "iframe", "base", "object", "embed", "img")
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "xlink:href", "action"):
            value = attributes.get(key) or ""
            assert value == "" or value.startswith(("#", "data:image/png;base64,"))
    assert [attributes for tag, attributes in reader.tags if tag == "script"] == [{}]
    outside = set(re.findall(r"url\((?!#)[^)]*\)|@import[^;]*", report.read_text()))
    assert outside == set()
    policies = [tag["content"] for _, tag in reader.tags if tag.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'; img-src data:;")


def test_report_says_what_was_measured_and_how(report: Path) -> None:
    text = " ".join(read(report).text)
    for said in (
        "hc_smoe 33 % †", "reap 33 %", "22.00", "espalier run demo", "c0ffee with uncommitted changes", "torch 2.13.0",
        "embedded (samples 16)", "embedded:moe <&>", "Which experts are alike", "espalier score 0123456789ab",
        "espalier run demo 'sweep=[{method:reap}]'",
    ):  # fmt: skip
        assert said in text
    assert "reproduc" not in text.lower()


def test_every_figure_has_a_text_and_a_caption(report: Path) -> None:
    reader = read(report)
    pictures = [attributes for tag, attributes in reader.tags if tag == "svg"]
    captions = [tag for tag, _ in reader.tags if tag == "figcaption"]
    tables = [attributes for tag, attributes in reader.tags if tag == "table"]
    assert len(pictures) == len(FIGURES)
    assert len(captions) == len(pictures) + len(tables)
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)
    assert all(attributes["aria-label"] for attributes in tables)
    said = "reap 33 %: 4.00 million unique parameters, 1.33 million active parameters, perplexity 22.00"
    assert said in str(pictures[0]["aria-label"])
    ids = [attributes["id"] for tag, attributes in reader.tags if tag == "section"]
    links = [attributes["href"] for tag, attributes in reader.tags if tag == "a"]
    assert links[: len(ids)] == [f"#{id}" for id in ids]
    every = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(every) == len(set(every))  # figures and sections do not share any
    assert {str(link)[1:] for link in links} <= set(every)  # names of rows lead to how they were made


def test_figures_are_saved_beside_for_papers(report: Path) -> None:
    assert sorted(path.name for path in report.with_suffix("").iterdir()) == FIGURES
    for name in FIGURES:
        assert ElementTree.parse(report.with_suffix("") / name).getroot().tag.endswith("svg")


def test_figures_follow_the_colours_of_the_page(report: Path) -> None:
    on_page = "".join(re.findall(r"<svg .*?</svg>", report.read_text(), re.S)).lower()
    saved = "".join((report.with_suffix("") / name).read_text() for name in FIGURES).lower()
    for colour in (style.INK, style.MUTED, style.PALE, *style.COLOURS[:2]):
        assert colour in saved
        assert f": {colour}" not in on_page
    assert "var(--ink)" in on_page
    assert "fill: #ffffff" not in on_page  # no white ground


def luminance(colour: str) -> float:
    """Relative luminance of a colour #rrggbb (WCAG 2)."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_text_and_lines_stand_out_on_light_and_dark_pages() -> None:
    css = (files("espalier") / "assets/report.css").read_text()
    palettes = [dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block)) for block in css.split("@media")[:2]]
    assert luminance(palettes[0]["paper"]) > 0.9 > 0.05 > luminance(palettes[1]["paper"])
    for palette in palettes:
        for ground in ("paper", "raised"):
            for text in ("ink", "muted", "link"):
                assert contrast(palette[text], palette[ground]) >= 4.5
        for number in range(len(style.COLOURS)):
            assert contrast(palette[f"c{number}"], palette["paper"]) >= 2
    assert [palettes[0][f"c{n}"] for n in range(len(style.COLOURS))] == list(style.COLOURS)


def test_report_of_a_dense_model_has_no_expert_sections(tmp_path: Path) -> None:
    reader = read(write(tmp_path / "r.html", Material(table([line("full", "none", 1e8, 0)]))))
    ids = [attributes["id"] for tag, attributes in reader.tags if tag == "section"]
    assert ids == ["results", "read", "quality", "made"]


def test_report_without_a_baseline_is_made(tmp_path: Path) -> None:
    lines = [line("reap 33 %", "reap", 4e6, 0), line("naee 33 %", "naee", 4e6, 0)]
    assert write(tmp_path / "r.html", Material(table(lines, None))).exists()


def test_the_sections_of_other_renderings_are_shown_too(tmp_path: Path) -> None:
    content = material()
    pair = {"model": "a", "share": 0.5, "measure": "perplexity", "first": "hc_smoe 33 %", "second": "reap 33 %"}
    pair |= {"value": 0.8, "low": 0.75, "high": 0.9, "p": 1e-4, "p_holm": 2e-4, "better": "hc_smoe 33 %"}
    said = {"not_reproduction": ["A small run: not a reproduction of it."], "pairs": [pair]}
    path = write(tmp_path / "r.html", replace(content, table=content.table | said))
    text = " ".join(read(path).text)
    assert '<figure class="table sortable prose"><figcaption>Methods in pairs.' in path.read_text()  # its lists wrap
    for shown in (
        "A small run: not a reproduction of it.",
        "Methods in pairs.",
        "compared on the same items",
        "reap 33 % (1.25 [1.11, 1.33], p < 0.001)",
    ):
        assert shown in text


def test_equal_inputs_make_equal_reports(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, material()) for name in ("one.html", "two.html"))
    assert one.read_bytes() == two.read_bytes()


def test_a_method_without_distances_shows_the_heights_of_its_tree(tmp_path: Path) -> None:
    content = material()
    bare = tuple(replace(one, distances={}) for one in content.lines)
    text = " ".join(read(write(tmp_path / "r.html", replace(content, lines=bare))).text)
    assert "the distances are not kept" in text


NASTY = """ <script>top.hostile=1</script><img src=x onerror="top.hostile=1">'"</style></svg>$\\frac{--><![CDATA["""


def test_hostile_names_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "r.html", material(NASTY, f"org/{NASTY}"))
    reader = read(path)  # tags close in order
    assert [attributes for tag, attributes in reader.tags if tag == "script"] == [{}]
    assert not [tag for tag, attributes in reader.tags if tag == "img" or "onerror" in attributes]
    assert NASTY.strip() in " ".join(reader.text)
    for saved in path.with_suffix("").iterdir():
        assert ElementTree.parse(saved).getroot().tag.endswith("svg")
        assert "hostile" not in saved.read_text()  # letters are drawn


def test_reports_import_no_torch() -> None:
    code = "import sys, espalier.report.figures, espalier.report.kernels; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
