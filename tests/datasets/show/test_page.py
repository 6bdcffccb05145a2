"""The page: well-formed HTML that needs nothing else, and says what it is given."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from cps_ray.datasets.shards import LeftOut, MadeBy, Manifest
from cps_ray.datasets.show.page import ImageSet, Messages, page
from cps_ray.datasets.show.picture import Thumbnail
from cps_ray.datasets.show.statistics import Statistics

VOID = {"meta", "img", "br"}
NASTY = "<b>&\"'</b>"
QUIET = Messages((), (), ())


class Strict(HTMLParser):
    """Fails on tags that are not closed in order; gathers text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def manifest_of(classes: int = 3, **more: object) -> Manifest:
    names = (NASTY, *(f"class {k}" for k in range(1, classes)))
    palette = tuple((k, 2 * k % 256, 255 - k) for k in range(classes))
    made_by = MadeBy(cps_ray="9.9", format=f"folder {NASTY}")
    return Manifest.model_validate(
        {"version": 3, "made_by": made_by, "classes": names, "palette": palette, "splits": {}, **more}
    )


def image_set_of(classes: int = 3, name: str = "train") -> ImageSet:
    """Returns a set of images with the first class in all ten masks, the second in five, the last in none, the others in one."""
    masks_per_class = np.ones(classes, np.int64)
    masks_per_class[:2], masks_per_class[-1] = (10, 5), 0
    cooccurrence = np.zeros((classes, classes))
    cooccurrence[0, 1], cooccurrence[1, 0], cooccurrence[2:-1, 0] = 0.5, 1.0, 0.004
    pixels = np.where(masks_per_class, 1, 0) * np.array([99_990, *[10] * (classes - 1)])
    sizes = {(360, 480): 11, (2, 3): 1}
    statistics = Statistics(12, 10, 1_500_000, sizes, pixels, masks_per_class, cooccurrence, 0.25)
    thumbnails = (
        Thumbnail(NASTY, np.full((20, 82, 3), (200, 30, 90), np.uint8), labeled=True),
        Thumbnail("bare", np.full((20, 40, 3), 7, np.uint8), labeled=False),
    )
    return ImageSet(name, statistics, thumbnails)


@pytest.mark.parametrize("classes", [3, 150])
def test_well_formed_html_that_needs_nothing_from_elsewhere(classes: int) -> None:
    text = page(NASTY, manifest_of(classes), [image_set_of(classes), image_set_of(classes, "val & more")], QUIET)
    parsed = Strict(text)
    assert {tag for tag, _ in parsed.tags} >= {"html", "title", "style", "table", "details", "figure", "img"}
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "b>", "object"}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]+", "", text))
    assert "prefers-color-scheme: dark" in text


def test_names_are_escaped_everywhere() -> None:
    messages = Messages((f"error {NASTY}",), (f"warning {NASTY}",), (f"note {NASTY}",))
    left_out = [LeftOut(file=f"file {NASTY}", why=NASTY)]
    text = page(NASTY, manifest_of(left_out=left_out), [image_set_of(name=NASTY)], messages)
    assert NASTY not in text
    parsed = Strict(text)
    seen = "".join(parsed.text)
    for wanted in ("error", "warning", "note", "file", "folder"):
        assert f"{wanted} {NASTY}" in seen
    assert [attributes["alt"] for tag, attributes in parsed.tags if tag == "img"] == [NASTY, "bare"]


def test_findings_come_first_worst_on_top_or_all_is_well() -> None:
    text = page("x", manifest_of(), [image_set_of()], Messages(("it is broken",), ("it is odd",), ("it was so",)))
    offsets = [text.index(words) for words in ("it is broken", "it is odd", "it was so", "<h2>Classes")]
    assert offsets == sorted(offsets)
    assert "matches its checksum" not in text
    assert "matches its checksum" in page("x", manifest_of(), [image_set_of()], Messages((), (), ("it was so",)))


def test_rare_classes_have_bars_one_can_see_and_absent_ones_are_named() -> None:
    text = page("x", manifest_of(), [image_set_of()], QUIET)
    assert re.search(r"<b>0\.01 %</b><span>5 masks</span></span><span class=\"bar\"><i style=\"width:20%", text)
    assert re.search(r"<b>99\.99 %</b><span>10 masks</span></span><span class=\"bar\"><i style=\"width:100%", text)
    assert text.count("no mask shows it") == 1
    assert "background:#0102fe" in text  # of class 1


def test_cooccurrence_is_a_percentage_of_the_masks_with_the_class_on_the_left() -> None:
    text = page("x", manifest_of(4), [image_set_of(4)], QUIET)
    body = text[text.index('class="heat"') :]
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", body[: body.index("</table>")])
    assert [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in rows] == [
        ["", "50", ""],
        ["100", "", ""],
        ["&lt;1", "", ""],
    ]
    assert '<td class="h5">50' in rows[0]


def test_counts_sizes_and_images() -> None:
    parsed = Strict(page("x", manifest_of(), [image_set_of()], QUIET))
    seen = " ".join(parsed.text)
    for wanted in ("10 with a mask", "2 without", "25.00 % ignored", "1.5 MB", "480 × 360", "11 images", "1 image"):
        assert wanted in seen
    assert seen.count("no mask ") == 2  # the mark of one image, and the class that is absent
    picture = next(attributes["src"] for tag, attributes in parsed.tags if tag == "img")
    assert picture is not None
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(picture.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels.shape == (20, 82, 3)
    assert np.abs(pixels.mean(axis=(0, 1)) - (200, 30, 90)).max() < 4


def test_many_sizes_are_summed_up() -> None:
    few = image_set_of().statistics
    sizes = {(10, 5): 4, **{(k, 20): 1 for k in range(20, 30)}}
    many = Statistics(14, 10, 1, sizes, few.pixels, few.masks_per_class, few.cooccurrence, 0.0)
    seen = " ".join(Strict(page("x", manifest_of(), [ImageSet("train", many, ())], QUIET)).text)
    assert "11 sizes" in seen
    for size, remark in (
        ("5 × 10", "smallest"),
        ("20 × 22", "median"),
        ("20 × 29", "largest"),
        ("5 × 10", "most frequent"),
    ):
        assert re.search(rf"{size} +{remark}", seen)


def test_a_page_of_nothing_but_errors() -> None:
    seen = " ".join(Strict(page("x", manifest_of(), [], Messages(("all is lost",), (), ()))).text)
    assert "all is lost" in seen


def test_what_sheets_cannot_draw_is_listed_with_what_they_draw_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_ascii(characters: str) -> str | None:
        return "" if characters.replace("…", "").isascii() else None

    monkeypatch.setattr("cps_ray.datasets.show.picture._font_file", only_ascii)
    images = image_set_of()
    named = ImageSet(
        "train", images.statistics, (*images.thumbnails, Thumbnail("人<1>", images.thumbnails[0].picture, True))
    )
    manifest = manifest_of()
    manifest = manifest.model_copy(update={"classes": ("a", "人行道", "b")})
    seen = Strict(page("x", manifest, [named], QUIET)).text
    assert "class 1 = 人行道" in seen
    assert "image 3 = 人<1>" in seen
    assert "a" in seen
    assert " bare" in seen
    assert not [text for text in seen if text.startswith(("class 0 =", "image 2 ="))]
