"""Work of `python -m cps_ray.init`: from folders to recipe.yaml, sweep.yaml, overlays.png and folds."""

import argparse
import hashlib
import io
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cps_ray.command import say
from cps_ray.config.reader import load_sweep
from cps_ray.config.yaml_reader import scalar
from cps_ray.datasets.images import read_image
from cps_ray.datasets.prepare.annotations.yolo import read_yolo_names
from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.datasets.prepare.guess import pixels, texts
from cps_ray.datasets.prepare.guess.layout import Layout, find_layout
from cps_ray.datasets.prepare.items import Source, read_mask
from cps_ray.datasets.prepare.masks import count_bytes
from cps_ray.datasets.prepare.pairing import split_sources
from cps_ray.datasets.prepare.photos import stretched_range
from cps_ray.datasets.prepare.recipe import REST, Recipe, load_recipe, voc_color
from cps_ray.datasets.raster import UnreadableError, upright_size
from cps_ray.datasets.show.picture import Thumbnail, contact_sheet, make_thumbnail
from cps_ray.errors import DataError
from cps_ray.files import read_json, write_json, write_whole
from cps_ray.text import display_path, first_few, printable, shell_path, spaced

_LARGE = 8_000_000
"""Pixels of photos that are cut into tiles."""
_TILE_PX, _OVERLAP_PX = 1024, 128
_OVERLAYS = 12
_STATE = ".init.json"
"""File in the output folder with the checksum of each file that was written: what differs was edited."""


def run(args: argparse.Namespace) -> int:
    """Looks, writes and says; returns the exit code."""
    from rich.console import Console

    console = Console()
    given = [path for path in (args.photos, args.masks, args.unlabeled) if path is not None]
    out = args.output or _default_output(args.photos)
    for path in given:
        if path.is_dir() and Path(os.path.abspath(out)).is_relative_to(os.path.abspath(path)):
            raise DataError(
                f"{out}: --output must not lie in {path}, whose files would then be its own; choose another."
            )
    layout = find_layout(args.photos, args.masks, args.unlabeled, pixels.is_mask)
    words = [word for path in given[: 1 + (args.masks is not None)] for word in [str(path)]]
    words += ["--unlabeled", str(args.unlabeled)] if args.unlabeled else []
    command = printable(shlex.join(["python", "-m", "cps_ray.init", *words]))
    proposal = _Proposal(layout, command, out)
    proposal.make()
    out.mkdir(parents=True, exist_ok=True)
    lines = _write(
        out,
        {
            "recipe.yaml": proposal.recipe_text.encode(),
            "sweep.yaml": proposal.sweep_text.encode(),
            "overlays.png": proposal.overlays,
        },
    )
    say(
        console,
        *(f"assumed: {what} (sure: {sure})" for what, sure in proposal.assumed),
        *lines,
        proposal.ok,
        f"next: {proposal.prepare}",
    )
    return 0


def _default_output(photos: Path) -> Path:
    """Returns NAME-cps in the working directory or, where that lies in the photos, beside them."""
    full = Path(os.path.abspath(photos))
    name = f"{full.name or 'photos'}-cps"
    here = Path.cwd()
    return full.parent / name if here.is_relative_to(full) else here / name


def _write(out: Path, files: dict[str, bytes]) -> list[str]:
    """Writes files that are new, or as an earlier run left them; beside edited ones, NAME.new.SUFFIX. Returns what to say."""
    state = read_json(out / _STATE) or {}
    lines = []
    for name, data in files.items():
        path = out / name
        if (
            path.exists()
            and path.read_bytes() != data
            and state.get(name) != hashlib.sha256(path.read_bytes()).hexdigest()
        ):
            other = path.with_name(f"{path.stem}.new{path.suffix}")
            write_whole(other, partial(_put, data))
            lines.append(f"{display_path(path)} was edited and stays; the new proposal is {display_path(other)}")
            continue
        write_whole(path, partial(_put, data))
        state[name] = hashlib.sha256(data).hexdigest()
        lines.append(f"wrote {display_path(path)}")
    write_json(out / _STATE, state)
    return lines


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)


class _Proposal:
    """A recipe and a sweep for a layout, tried on the files."""

    def __init__(self, layout: Layout, command: str, out: Path) -> None:
        self.layout, self.command, self.out = layout, command, out
        self.assumed = list(layout.assumed)
        self.recipe_text = self.sweep_text = self.ok = ""
        self.overlays = b""
        self.prepare = (
            f"python -m cps_ray.prepare folder {shell_path(layout.raw)} {shell_path(out / 'shards')} "
            f"--recipe {shell_path(out / 'recipe.yaml')}"
        )

    def make(self) -> None:
        """Makes texts and picture. Raises DataError or ConfigError if nothing that works can be made."""
        layout = self.layout
        settings: dict[str, Any] = dict(layout.settings)
        comments: list[str] = []
        entries: list[dict[str, Any]] = [
            {"name": name, "color": color or voc_color(at)} for at, (name, color) in enumerate(layout.classes or ())
        ]
        sources = self._sources(entries or [{"name": "a"}, {"name": "b"}])
        labeled = [source for group in sources.values() for source in group if source.masks]
        unlabeled = [source for group in sources.values() for source in group if not source.masks]
        if not labeled:
            raise DataError(f"{layout.raw}: some photos must have a mask, but none has.")
        sampled = pixels.spread(labeled)
        if layout.has_values:
            looks = pixels.each(lambda source: pixels.look_at_mask(source.mask or ""), sampled)
            seen = [(source, look) for source, look in zip(sampled, looks, strict=True) if not isinstance(look, str)]
            if not seen:
                raise DataError(str(looks[0]))
            classes = pixels.find_classes([look for _, look in seen], layout.classes)
            entries, comments = classes.entries, classes.comments
            settings |= classes.settings
            lies, how = pixels.find_alignment([source for source, _ in seen], [look for _, look in seen])
            settings |= lies
            self.assumed += [*classes.assumed, *how]
        photos = pixels.look_at_photos([source.image for group in sources.values() for source in group])
        settings |= photos.settings
        self.assumed += photos.assumed
        size = photos.size
        if size[0] * size[1] > _LARGE:
            settings["tiles"] = {"size_px": _TILE_PX, "overlap_px": _OVERLAP_PX}
            size = (_TILE_PX, _TILE_PX)
            self.assumed.append(
                (f"training photos are cut into tiles of {_TILE_PX} px", "high: they have many megapixels")
            )
        splits, grouping = self._with_draws(
            len([s for s in sources["train"] if s.masks]), [s.id for s in sources["train"]]
        )
        self.recipe_text = texts.recipe_text(self.command, entries, settings, comments, splits, grouping, self.assumed)
        recipe = self._checked(self.recipe_text)
        if recipe.stretch is not None:
            stretched_range(sources["train"], recipe.stretch, recipe.bands)
        self.recipe, self.sources = recipe, sources
        self.reader = recipe.reader(read_yolo_names(str(layout.raw / recipe.yolo_names)) if recipe.yolo_names else {})
        self._try(sampled)
        held_out = sum(recipe.fractions.values())
        in_train = round(sum(bool(source.masks) for source in sources["train"]) * (1 - held_out))
        amount = texts.Amount(in_train, len(unlabeled), size, recipe.group_by, _has_gpu())
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.out.resolve().name).strip("-._") or "mine"
        self.sweep_text = texts.sweep_text(self.command, name, "shards", self.prepare, amount)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "sweep.yaml").write_text(self.sweep_text, encoding="utf-8")
            load_sweep(Path(folder) / "sweep.yaml")
        self.ok = (
            f"ok: {spaced(len(labeled))} labelled, {spaced(len(unlabeled))} unlabelled, {len(recipe.classes)} classes"
        )

    def _sources(self, classes: Sequence[dict[str, Any]]) -> dict[str, tuple[Source, ...]]:
        """Returns the sources of each split; masks without a photo are excluded from then on."""
        settings = {name: part for name, part in self.layout.settings.items() if name == "uncovered"}
        for split in self.layout.splits.values():
            split.setdefault("images", [])
        for _ in range(2):
            text = texts.recipe_text("", classes, settings, [], self.layout.splits, None, [])
            recipe = self._checked(text)
            findings: list[Finding] = []
            found, alone = {}, {}
            for name in recipe.files:
                before = len(findings)
                found[name] = split_sources(self.layout.raw, name, recipe, findings, [])
                mine = findings[before:]
                alone[name] = [
                    re.search(r"but the mask (.*) has no image", f.found) for f in mine if f.rule == "no image"
                ]
                bare = sum(finding.rule == "no mask" for finding in mine)
                if bare:
                    self.layout.splits[name].setdefault("unlabeled", []).append(REST)
            lonely = {name: [scalar(match[1]) for match in matches if match] for name, matches in alone.items()}
            if not any(lonely.values()) and not any(finding.rule == "no mask" for finding in findings):
                break
            for name, ids in lonely.items():
                if ids:
                    self.layout.splits[name]["exclude"] = sorted(map(str, ids))
                    self.assumed.append(
                        (
                            f"{len(ids)} masks of {name} have no photo and are left out: {first_few(sorted(map(str, ids)))}",
                            "high",
                        )
                    )
        repeated = [finding for finding in findings if finding.fatal]
        if repeated:
            self.assumed.append((f"{len(repeated)} files cannot be paired; {repeated[0].line}", "prepare names them"))
        return found

    def _checked(self, text: str) -> Recipe:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(text, encoding="utf-8")
            return load_recipe(path)

    def _with_draws(self, count: int, ids: Sequence[str]) -> tuple[dict[str, Any], texts.Grouping | None]:
        """Returns the splits with those that must be drawn from train, and how images may belong together."""
        splits: dict[str, Any] = dict(self.layout.splits)
        missing = [name for name in ("val", "test") if name not in splits]
        if not missing:
            return splits, None
        if count < 1 + len(missing):
            raise DataError(
                f"{self.layout.raw}: {1 + len(missing)} labelled photos at least are needed for train and {' and '.join(missing)}, but there are {count}."
            )
        fraction = 0.1 if count >= 1000 else 0.15 if count >= 200 else max(0.2, np.ceil(100 / count) / 100)
        splits |= dict.fromkeys(missing, float(fraction))
        grouping = texts.find_grouping(ids)
        what = f"{' and '.join(missing)} are drawn, {fraction:g} of the labelled images each"
        self.assumed.append((what, "high: no folders say otherwise"))
        if grouping is not None and grouping.is_clear:
            self.assumed.append(
                (f"names belong together in {grouping.groups} groups, which stay whole", "high: frames or tiles")
            )
        elif grouping is not None:
            self.assumed.append(
                (
                    "every photo is on its own",
                    f"low: names would make {grouping.groups} groups; see group_by in recipe.yaml",
                )
            )
        return splits, grouping

    def _try(self, sampled: Sequence[Source]) -> None:
        """Reads some masks as the recipe says, and draws a few. Raises DataError if none can be read."""

        def read(source: Source) -> np.ndarray[Any, Any] | str:
            try:
                size, orientation = upright_size(Path(source.image).read_bytes(), source.image)
                return read_mask(self.reader, source, size, orientation)[0]
            except BadItemError as error:
                return error.finding.line
            except (OSError, UnreadableError) as error:
                return f"{source.image}: {error}"

        pixels_of = np.zeros(len(self.recipe.classes), np.int64)
        bad: list[str] = []
        shown: list[Thumbnail] = []
        drawn = {source.id for source in pixels.spread(sampled, _OVERLAYS)}
        for source in sampled:
            mask = read(source)
            if isinstance(mask, str):
                bad.append(mask)
                continue
            pixels_of += count_bytes(mask)[: len(pixels_of)]
            if source.id in drawn:
                thumbnail = self._thumbnail(source, mask)
                shown += [thumbnail] if thumbnail else []
        if len(bad) == len(sampled):
            raise DataError(bad[0].rstrip(".") + ".")
        if bad:
            self.assumed.append(
                (f"{len(bad)} of {len(sampled)} masks looked at cannot be used; {bad[0]}", "prepare names them")
            )
        classes = [entry.name for entry in self.recipe.classes]
        absent = [name for name, count in zip(classes, pixels_of, strict=True) if not count]
        sheet = contact_sheet(display_path(self.layout.raw), shown, classes, self.recipe.palette(), absent)
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        self.overlays = buffer.getvalue()

    def _thumbnail(self, source: Source, mask: Any) -> Thumbnail | None:
        value_range = None
        if self.recipe.stretch is not None:
            value_range = stretched_range([source], self.recipe.stretch, self.recipe.bands)
        try:
            picture = read_image(Path(source.image).read_bytes(), value_range, self.recipe.bands, source.image)
        except UnreadableError:
            return None
        return make_thumbnail(source.id, picture.pixels, mask, self.recipe.palette())


def _has_gpu() -> bool:
    # Not asked of torch, which takes seconds to import; WSL has /dev/dxg.
    return bool([*Path("/dev").glob("nvidia[0-9]*")]) or Path("/dev/dxg").exists()
