"""A data set as one HTML page: its findings, numbers and examples; no script, nothing fetched, so that it can be mailed."""

import base64
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

import cv2
import numpy as np
from rich.filesize import decimal

from cps_ray.datasets.shards import Manifest
from cps_ray.datasets.show.picture import IGNORED, NO_MASK, Thumbnail, class_label, image_label
from cps_ray.datasets.show.statistics import Size, Statistics, percent, size_text

_DECADES = 5
"""Powers of ten that a bar spans: from 0.001 to 100 %."""
_MAX_LISTED_SIZES = 8
"""Most distinct sizes that are listed one by one; more are summed up."""
_JPEG_QUALITY = 85


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images that the page describes apart: a split, or its labelled subset."""

    name: str
    statistics: Statistics
    thumbnails: tuple[Thumbnail, ...]
    """Examples; none if none can be read."""


@dataclass(frozen=True, slots=True)
class Messages:
    """Sentences for the top of the page, one for each finding or decision."""

    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def page(name: str, manifest: Manifest, image_sets: Sequence[ImageSet], messages: Messages) -> str:
    """Returns the whole page as HTML. `name`: of the data set."""
    masked = [image_set for image_set in image_sets if image_set.statistics.masks]
    # An index that is damaged hides its split, so there may be no image set at all; sections without content are left out.
    sections = [
        _header(name, manifest, image_sets),
        _findings(manifest, messages),
        _classes(manifest, masked) if masked else "",
        _cooccurrence(manifest, masked) if masked else "",
        _sizes(image_sets) if image_sets else "",
        _images(manifest, image_sets) if image_sets else "",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(name)}</title>\n<style>{_STYLE}{_heat_style()}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _header(name: str, manifest: Manifest, image_sets: Sequence[ImageSet]) -> str:
    origin = (
        f"{manifest.made_by.format} · prepared by cps_ray {manifest.made_by.cps_ray} · {len(manifest.classes)} classes"
    )
    cards = "".join(_card(image_set) for image_set in image_sets)
    return f'<header>\n<h1>{escape(name)}</h1>\n<p>{escape(origin)}</p>\n<div class="cards">{cards}</div>\n</header>'


def _card(image_set: ImageSet) -> str:
    statistics = image_set.statistics
    facts = [f"{statistics.masks:,} with a mask"]
    if statistics.unlabeled:
        facts.append(f"{statistics.unlabeled:,} without")
    if statistics.masks:
        # `percent` writes nothing as `-`, for columns of numbers; in a sentence it is 0.
        facts.append(f"{percent(statistics.ignored).replace('-', '0')} % {IGNORED}")
    facts.append(decimal(statistics.bytes))
    lines = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<div class="card"><h2>{escape(image_set.name)}</h2>'
        f'<p class="big">{statistics.images:,} <small>images</small></p><ul>{lines}</ul></div>'
    )


def _findings(manifest: Manifest, messages: Messages) -> str:
    left_out = [f"{item.file}: {item.why}" for item in manifest.left_out]
    by_kind = [
        ("error", messages.errors),
        ("warning", messages.warnings),
        ("note", messages.notes),
        ("left out", left_out),
    ]
    rows = "".join(_finding_rows(kind, list(lines)) for kind, lines in by_kind)
    if not (messages.errors or messages.warnings):
        good = "Every file matches its checksum, every image and mask was decoded, and no check found anything."
        rows = f'<li class="good"><b>intact</b><span>{good}</span></li>{rows}'
    return f'<section>\n<h2>Findings</h2>\n<ul class="findings">{rows}</ul>\n</section>'


def _finding_rows(kind: str, lines: Sequence[str]) -> str:
    return "".join(
        f'<li class="{kind.replace(" ", "-")}"><b>{kind}</b><span>{escape(line)}</span></li>' for line in lines
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _color(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _class_label(name: str, color: tuple[int, int, int]) -> str:
    return f'<i class="swatch" style="background:{_color(color)}"></i>{escape(name)}'


def _classes(manifest: Manifest, image_sets: Sequence[ImageSet]) -> str:
    heads = "".join(f'<th scope="col">{escape(image_set.name)}</th>' for image_set in image_sets)
    rows = []
    for label, (name, color) in enumerate(zip(manifest.classes, manifest.palette, strict=True)):
        cells = "".join(_frequency_cell(image_set.statistics, label, color) for image_set in image_sets)
        rows.append(f'<tr><th scope="row">{_class_label(name, color)}</th>{cells}</tr>')
    return (
        '<section>\n<h2>Classes</h2>\n<p class="about">Percentage of the counted pixels, and how many masks show the class. '
        "Bars are logarithmic, from 0.001 % to 100 %: each mark is ten times the one before.</p>\n"
        f'<div class="scroll"><table class="classes"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n</section>"
    )


def _frequency_cell(statistics: Statistics, label: int, color: tuple[int, int, int]) -> str:
    fraction, masks = float(statistics.frequency[label]), int(statistics.masks_per_class[label])
    if not masks:
        return '<td class="absent">no mask shows it</td>'
    # A class that a mask shows has pixels, so the logarithm exists; below 0.001 % the bar keeps 1 % of its width.
    width = max(1.0, 100 * (1 + math.log10(fraction) / _DECADES))
    return (
        f'<td><span class="numbers"><b>{percent(fraction)} %</b><span>{_count(masks, "mask")}</span></span>'
        f'<span class="bar"><i style="width:{width:.0f}%;background:{_color(color)}"></i></span></td>'
    )


def _heat_style() -> str:
    # Level n is for cells of up to 10 n %. See .heat in _STYLE: the number is how much blue there is.
    levels = (f".heat .h{level}{{--heat:{9 * level}%}}" for level in range(1, 11))
    return "".join(levels)


def _cooccurrence(manifest: Manifest, image_sets: Sequence[ImageSet]) -> str:
    tables = "".join(
        _cooccurrence_table(manifest, image_set, opened=number == 0) for number, image_set in enumerate(image_sets)
    )
    return (
        '<section>\n<h2>Co-occurrence</h2>\n<p class="about">Of the masks that show the class on the left, the percentage '
        f"that shows the class above too. Empty: none.</p>\n{tables}\n</section>"
    )


def _cooccurrence_table(manifest: Manifest, image_set: ImageSet, opened: bool) -> str:
    present = np.flatnonzero(image_set.statistics.masks_per_class).tolist()
    labels = {k: _class_label(manifest.classes[k], manifest.palette[k]) for k in present}
    heads = "".join(f'<th scope="col"><span>{labels[k]}</span></th>' for k in present)
    rows = "".join(
        f'<tr><th scope="row">{labels[a]}</th>{"".join(_heat_cells(image_set.statistics, a, present))}</tr>'
        for a in present
    )
    return (
        f"<details{' open' * opened}><summary>{escape(image_set.name)}</summary>"
        f'<div class="scroll tall"><table class="heat"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _heat_cells(statistics: Statistics, a: int, present: Iterable[int]) -> Iterator[str]:
    for b in present:
        fraction = float(statistics.cooccurrence[a, b])
        if a == b:
            yield '<td class="self"></td>'
        elif fraction:
            # Only all is 100, and only none is empty.
            text = "&lt;1" if fraction < 0.01 else str(min(99, round(100 * fraction)) if fraction < 1 else 100)
            yield f'<td class="h{math.ceil(10 * fraction)}">{text}</td>'
        else:
            yield "<td></td>"


def _sizes(image_sets: Sequence[ImageSet]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(image_set.name)}</th><td>{_size_chips(image_set.statistics)}</td></tr>'
        for image_set in image_sets
    )
    return (
        '<section>\n<h2>Sizes</h2>\n<p class="about">Width and height in pixels.</p>\n'
        f'<div class="scroll"><table class="sizes"><tbody>{rows}</tbody></table></div>\n</section>'
    )


def _size_chips(statistics: Statistics) -> str:
    def chip(size: Size, remark: str) -> str:
        return f'<span class="chip"><b>{size_text(size).replace("x", " × ")}</b> {remark}</span>'

    if len(statistics.sizes) <= _MAX_LISTED_SIZES:
        return "".join(chip(size, _count(count, "image")) for size, count in statistics.sizes.items())
    extremes = zip(statistics.extremes(), ("smallest", "median", "largest"), strict=True)
    most, count = next(iter(statistics.sizes.items()))  # the most frequent size comes first
    chips = [*(chip(size, word) for size, word in extremes), chip(most, f"most frequent, {_count(count, 'image')}")]
    return f'<span class="chip">{len(statistics.sizes):,} sizes</span>{"".join(chips)}'


def _images(manifest: Manifest, image_sets: Sequence[ImageSet]) -> str:
    named = enumerate(zip(manifest.classes, manifest.palette, strict=True))
    labels = [_class_label(_with_stand_in(class_label(name, k), name), color) for k, (name, color) in named]
    labels.append(f'<i class="swatch ignored"></i>{IGNORED}')
    legend = "".join(f"<li>{label}</li>" for label in labels)
    sheets = "".join(
        f"<h3>{escape(image_set.name)}</h3>\n"
        f'<div class="sheet">{"".join(map(_figure, image_set.thumbnails, count(1))) or "None can be read."}</div>\n'
        for image_set in image_sets
    )
    return (
        '<section>\n<h2>Images</h2>\n<p class="about">Drawn so that every class is shown. To the right of an image, its mask '
        f'lies over the image in grey.</p>\n<ul class="legend">{legend}</ul>\n{sheets}</section>'
    )


def _with_stand_in(drawn: str, name: str) -> str:
    """Returns `class 7 = NAME` where the contact sheets draw something else than the name."""
    return name if drawn == name else f"{drawn} = {name}"


def _figure(thumbnail: Thumbnail, number: int) -> str:
    success, data = cv2.imencode(
        ".jpg", cv2.cvtColor(thumbnail.picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    )
    assert success
    height, width = thumbnail.picture.shape[:2]
    caption = _with_stand_in(image_label(thumbnail.id, number), thumbnail.id)
    mark = "" if thumbnail.labeled else f'<b class="mark">{NO_MASK}</b> '
    # Embedded in the page as a data URL, because it must not need a file beside it.
    return (
        f'<figure style="max-width:{max(width, 150)}px"><img width="{width}" height="{height}" alt="{escape(thumbnail.id)}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(bytes(data)).decode()}">'
        f"<figcaption>{mark}{escape(caption)}</figcaption></figure>"
    )


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f8fa; --ink: #1f2328; --faint: #59636e; --line: #d8dee4;
  --red: #c2202c; --amber: #9a5b00; --green: #1a7f37; --blue: #0969da; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1318; --card: #181e26; --ink: #e6edf3; --faint: #9198a1;
  --line: #303842; --red: #ff7b72; --amber: #e3a53b; --green: #4ac26b; --blue: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
header > p, .about { margin: .25rem 0 1rem; color: var(--faint); overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(10.4rem, 1fr)); }
.card { padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card h2 { margin: 0; font-size: .95rem; color: var(--faint); overflow-wrap: anywhere; }
.card ul { margin: 0; padding: 0; list-style: none; color: var(--faint); font-size: .88rem; }
.big { margin: 0; font-size: 1.6rem; font-weight: 650; }
.big small { font-size: .9rem; font-weight: 400; color: var(--faint); }
.findings { margin: 0; padding: 0; list-style: none; display: grid; gap: .4rem; }
.findings li { --kind: var(--blue); display: flex; gap: .75rem; padding: .45rem .8rem; background: var(--card);
  border-left: 3px solid var(--kind); border-radius: 4px; }
.findings b { flex: 0 0 4.4rem; color: var(--kind); }
.findings span { min-width: 0; overflow-wrap: anywhere; }
.findings .error { --kind: var(--red); } .findings .warning { --kind: var(--amber); }
.findings .left-out { --kind: var(--faint); } .findings .good { --kind: var(--green); }
.scroll { overflow: auto; }
.swatch { display: inline-block; flex: none; width: .95em; height: .95em; margin-right: .5em; border-radius: 3px;
  border: 1px solid color-mix(in srgb, var(--ink) 35%, transparent); vertical-align: -.12em; }
.ignored { background: repeating-linear-gradient(135deg, #e1e1e1 0 2px, #5a5a5a 2px 5px); }
.classes { width: 100%; }
.classes th, .classes td { padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid var(--line); }
.classes td { min-width: 10.5rem; }
.classes tbody th { position: sticky; left: 0; min-width: 8.5rem; max-width: 18rem; padding-right: 1rem;
  background: var(--paper); font-weight: 500; overflow-wrap: break-word; }
@media (max-width: 40rem) { .classes tbody th { max-width: 9rem; } }
.numbers { display: flex; justify-content: space-between; gap: 1rem; font-size: .85rem; white-space: nowrap; }
.numbers span { color: var(--faint); }
.bar { display: block; height: 8px; margin-top: 3px; border-radius: 2px; overflow: hidden; background:
  repeating-linear-gradient(90deg, transparent 0 calc(20% - 1px), var(--line) calc(20% - 1px) 20%), var(--card); }
.bar i { display: block; height: 100%; border-radius: 2px; outline: 1px solid color-mix(in srgb, var(--ink) 35%, transparent);
  outline-offset: -1px; }
.absent { color: var(--red); font-size: .85rem; }
details { margin-bottom: .75rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .4rem; }
.tall { max-height: 80vh; }
.heat { font-size: .8rem; }
.heat td { min-width: 2.3rem; height: 1.75rem; text-align: center; border: 1px solid var(--paper); --heat: 0%;
  background: color-mix(in srgb, var(--blue) var(--heat), var(--card)); }
.heat .h7, .heat .h8, .heat .h9, .heat .h10 { color: var(--paper); }
.heat .self { background: repeating-linear-gradient(135deg, var(--line) 0 1px, var(--card) 1px 5px); }
.heat th { font-weight: 500; white-space: nowrap; background: var(--paper); position: sticky; }
.heat tbody th { left: 0; padding-right: .75rem; z-index: 1; max-width: 14rem; overflow: hidden; text-overflow: ellipsis; }
.heat thead th { top: 0; z-index: 2; vertical-align: bottom; text-align: center; padding: .3rem 0; }
.heat thead th:first-child { left: 0; z-index: 3; }
.heat thead span { display: inline-block; writing-mode: vertical-rl; transform: rotate(180deg); max-height: 11rem;
  overflow: hidden; text-overflow: ellipsis; }
.heat thead .swatch { margin: 0 0 .5em; }
.sizes th { padding: .3rem 1.2rem .3rem 0; vertical-align: top; white-space: nowrap; }
.chip { display: inline-block; margin: 0 .4rem .4rem 0; padding: .15rem .6rem; border: 1px solid var(--line);
  border-radius: 99px; background: var(--card); font-size: .88rem; white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 0; padding: .6rem .9rem; list-style: none;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; font-size: .88rem; }
.sheet { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-end; }
figure { margin: 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { margin-top: .25rem; font-size: .82rem; color: var(--faint); overflow-wrap: anywhere; }
.mark { color: var(--amber); }
"""
