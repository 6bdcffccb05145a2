"""What is known of a data set as one HTML page: no script, nothing fetched, fit to be mailed."""

import base64
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np
from rich.filesize import decimal

from cps_ray.datasets.shards import Manifest
from cps_ray.datasets.show.picture import IGNORED, NO_MASK, Thumbnail
from cps_ray.datasets.show.statistics import Size, Statistics, percent, size_text

_DECADES = 5
"""Of the bars: from 0.001 to 100 %."""
_MANY_SIZES = 8
_JPEG_QUALITY = 85


@dataclass(frozen=True, slots=True)
class Part:
    """A split, or the labelled part of one."""

    name: str
    statistics: Statistics
    thumbnails: tuple[Thumbnail, ...]


@dataclass(frozen=True, slots=True)
class Said:
    """Sentences, one for each trouble or decision."""

    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def page(name: str, manifest: Manifest, parts: Sequence[Part], said: Said) -> str:
    """The whole page. `name`: of the data set."""
    masked = [part for part in parts if part.statistics.masks]
    sections = [
        _header(name, manifest, parts),
        _findings(manifest, said),
        _classes(manifest, masked) if masked else "",
        _cooccurrence(manifest, masked) if masked else "",
        _sizes(parts) if parts else "",
        _images(manifest, parts) if parts else "",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(name)}</title>\n<style>{_STYLE}{_heat()}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _header(name: str, manifest: Manifest, parts: Sequence[Part]) -> str:
    made = (
        f"{manifest.made_by.format} · prepared by cps_ray {manifest.made_by.cps_ray} · {len(manifest.classes)} classes"
    )
    cards = "".join(_card(part) for part in parts)
    return f'<header>\n<h1>{escape(name)}</h1>\n<p>{escape(made)}</p>\n<div class="cards">{cards}</div>\n</header>'


def _card(part: Part) -> str:
    known = part.statistics
    facts = [f"{known.masks:,} with a mask"]
    if known.unlabeled:
        facts.append(f"{known.unlabeled:,} without")
    if known.masks:
        facts.append(f"{percent(known.ignored).replace('-', '0')} % {IGNORED}")
    facts.append(decimal(known.bytes))
    lines = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<div class="card"><h2>{escape(part.name)}</h2>'
        f'<p class="big">{known.images:,} <small>images</small></p><ul>{lines}</ul></div>'
    )


def _findings(manifest: Manifest, said: Said) -> str:
    left_out = [f"{one.file}: {one.why}" for one in manifest.left_out]
    groups = [("error", said.errors), ("warning", said.warnings), ("note", said.notes), ("left out", left_out)]
    rows = "".join(_finding(kind, list(lines)) for kind, lines in groups)
    if not (said.errors or said.warnings):
        good = "Every file matches its checksum, every image and mask was decoded, and no check found anything."
        rows = f'<li class="good"><b>whole</b><span>{good}</span></li>{rows}'
    return f'<section>\n<h2>Findings</h2>\n<ul class="findings">{rows}</ul>\n</section>'


def _finding(kind: str, lines: Sequence[str]) -> str:
    return "".join(
        f'<li class="{kind.replace(" ", "-")}"><b>{kind}</b><span>{escape(line)}</span></li>' for line in lines
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _color(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _label(name: str, color: tuple[int, int, int]) -> str:
    return f'<i class="swatch" style="background:{_color(color)}"></i>{escape(name)}'


def _classes(manifest: Manifest, parts: Sequence[Part]) -> str:
    heads = "".join(f'<th scope="col">{escape(part.name)}</th>' for part in parts)
    rows = []
    for label, (name, color) in enumerate(zip(manifest.classes, manifest.palette, strict=True)):
        cells = "".join(_frequency(part.statistics, label, color) for part in parts)
        rows.append(f'<tr><th scope="row">{_label(name, color)}</th>{cells}</tr>')
    return (
        '<section>\n<h2>Classes</h2>\n<p class="about">Fraction of the counted pixels, and how many masks show the class. '
        "Bars are logarithmic, from 0.001 % to 100 %: each mark is ten times the one before.</p>\n"
        f'<div class="scroll"><table class="classes"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n</section>"
    )


def _frequency(known: Statistics, label: int, color: tuple[int, int, int]) -> str:
    share, masks = float(known.frequency[label]), int(known.shown[label])
    if not masks:
        return '<td class="absent">no mask shows it</td>'
    width = max(1.0, 100 * (1 + math.log10(share) / _DECADES))
    return (
        f'<td><span class="numbers"><b>{percent(share)} %</b><span>{_count(masks, "mask")}</span></span>'
        f'<span class="bar"><i style="width:{width:.0f}%;background:{_color(color)}"></i></span></td>'
    )


def _heat() -> str:
    levels = (f".heat .h{level}{{--heat:{9 * level}%}}" for level in range(1, 11))
    return "".join(levels)


def _cooccurrence(manifest: Manifest, parts: Sequence[Part]) -> str:
    tables = "".join(_together(manifest, part, opened=number == 0) for number, part in enumerate(parts))
    return (
        '<section>\n<h2>Co-occurrence</h2>\n<p class="about">Of the masks that show the class on the left, the per cent '
        f"that show the class above too. Empty: never.</p>\n{tables}\n</section>"
    )


def _together(manifest: Manifest, part: Part, opened: bool) -> str:
    shown = np.flatnonzero(part.statistics.shown).tolist()
    labels = {k: _label(manifest.classes[k], manifest.palette[k]) for k in shown}
    heads = "".join(f'<th scope="col"><span>{labels[k]}</span></th>' for k in shown)
    rows = "".join(
        f'<tr><th scope="row">{labels[a]}</th>{"".join(_cells(part.statistics, a, shown))}</tr>' for a in shown
    )
    return (
        f"<details{' open' * opened}><summary>{escape(part.name)}</summary>"
        f'<div class="scroll tall"><table class="heat"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _cells(known: Statistics, a: int, shown: Iterable[int]) -> Iterator[str]:
    for b in shown:
        share = float(known.together[a, b])
        if a == b:
            yield '<td class="self"></td>'
        elif share:
            # Only all is 100, and only none is empty.
            text = "&lt;1" if share < 0.01 else str(min(99, round(100 * share)) if share < 1 else 100)
            yield f'<td class="h{math.ceil(10 * share)}">{text}</td>'
        else:
            yield "<td></td>"


def _sizes(parts: Sequence[Part]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(part.name)}</th><td>{_some_sizes(part.statistics)}</td></tr>' for part in parts
    )
    return (
        '<section>\n<h2>Sizes</h2>\n<p class="about">Width and height in pixels.</p>\n'
        f'<div class="scroll"><table class="sizes"><tbody>{rows}</tbody></table></div>\n</section>'
    )


def _some_sizes(known: Statistics) -> str:
    def chip(size: Size, said: str) -> str:
        return f'<span class="chip"><b>{size_text(size).replace("x", " × ")}</b> {said}</span>'

    if len(known.sizes) <= _MANY_SIZES:
        return "".join(chip(size, _count(count, "image")) for size, count in known.sizes.items())
    named = zip(known.extremes(), ("smallest", "median", "largest"), strict=True)
    most, count = next(iter(known.sizes.items()))
    chips = [*(chip(size, word) for size, word in named), chip(most, f"most frequent, {_count(count, 'image')}")]
    return f'<span class="chip">{len(known.sizes):,} sizes</span>{"".join(chips)}'


def _images(manifest: Manifest, parts: Sequence[Part]) -> str:
    entries = [_label(name, color) for name, color in zip(manifest.classes, manifest.palette, strict=True)]
    entries.append(f'<i class="swatch ignored"></i>{IGNORED}')
    legend = "".join(f"<li>{label}</li>" for label in entries)
    sheets = "".join(
        f"<h3>{escape(part.name)}</h3>\n"
        f'<div class="sheet">{"".join(_figure(one) for one in part.thumbnails) or "None can be read."}</div>\n'
        for part in parts
    )
    return (
        '<section>\n<h2>Images</h2>\n<p class="about">Drawn so that every class is shown; the mask lies over the grey '
        f'image to the right.</p>\n<ul class="legend">{legend}</ul>\n{sheets}</section>'
    )


def _figure(one: Thumbnail) -> str:
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(one.picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    )
    assert done
    height, width = one.picture.shape[:2]
    mark = "" if one.labeled else f'<b class="mark">{NO_MASK}</b> '
    return (
        f'<figure style="max-width:{max(width, 150)}px"><img width="{width}" height="{height}" alt="{escape(one.id)}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(bytes(data)).decode()}">'
        f"<figcaption>{mark}{escape(one.id)}</figcaption></figure>"
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
