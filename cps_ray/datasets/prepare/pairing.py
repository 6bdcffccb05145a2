"""Files of a split, and which of them belong together: images, their masks, and images that have none."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path

from cps_ray.datasets.lists import listed_ids, normalized
from cps_ray.datasets.prepare.annotations.coco import coco_train_ids, read_coco
from cps_ray.datasets.prepare.findings import Finding
from cps_ray.datasets.prepare.items import MaskFile, Source
from cps_ray.datasets.prepare.patterns import ID, Found, Pattern
from cps_ray.datasets.prepare.recipe import REST, Recipe
from cps_ray.errors import DataError
from cps_ray.text import first_few


def _find_files(raw: Path, patterns: Iterable[str], setting: str) -> list[Found]:
    """Finds the files of all patterns, sorted by path. Raises DataError, naming the `setting`, if a pattern finds none."""
    found: dict[Path, Found] = {}
    for pattern in patterns:
        files = Pattern(pattern).find(raw)
        if not files:
            is_folder = (raw / pattern).is_dir()
            remedy = (
                f"for all files of this folder, write {pattern.rstrip('/')}/*."
                if is_folder
                else "is the raw data complete?"
            )
            raise DataError(f"{raw}: {setting} {pattern!r} must match files, but matches none; {remedy}")
        found = {file.path: file for file in files} | found  # the first pattern that finds a file says its id
    return [found[path] for path in sorted(found)]


def _by_id(files: Iterable[Found], long: bool) -> dict[str, list[Path]]:
    by_id: dict[str, list[Path]] = {}
    for file in files:
        by_id.setdefault(file.long_id if long else file.id, []).append(file.path)
    return by_id


def _repeat(by_id: Mapping[str, Sequence[Path]]) -> bool:
    return any(len(paths) > 1 for paths in by_id.values())


class _SplitFiles:
    """The files of one split, by the ids that they have in common."""

    def __init__(self, raw: Path, name: str, recipe: Recipe) -> None:
        """Finds the files. Raises DataError if a pattern finds none."""
        self.raw, self.name, self.split = raw, name, recipe.files[name]
        self.classes = [entry.name for entry in recipe.classes]
        patterns = {
            "images": self.split.images,
            "unlabeled": [pattern for pattern in self.split.unlabeled if pattern != REST],
            "ignore_masks": self.split.ignore_masks,
        }
        labels = sorted(self.split.class_masks, key=lambda label: self._train_id(label) or 0)
        patterns |= {f"masks.{label}".rstrip("."): self.split.class_masks[label] for label in labels}
        found = {setting: _find_files(raw, globs, f"splits.{name}.{setting}") for setting, globs in patterns.items()}
        self._keep_apart(found)
        images, unlabeled, fields = (found[setting] for setting in ("images", "unlabeled", "ignore_masks"))
        masks = {label: found[f"masks.{label}".rstrip(".")] for label in labels}
        self.long_ids = self._must_be_long(images, masks, [unlabeled, fields])
        """Whether ids hold the folders that wildcards match."""
        self.images, self.unlabeled, self.fields = (
            _by_id(files, self.long_ids) for files in (images, unlabeled, fields)
        )
        self.masks = {label: _by_id(files, self.long_ids) for label, files in masks.items()}
        """Class, or "" -> id -> files."""
        self.described: dict[str, MaskFile] = {}
        """Id -> its part of the COCO file."""
        same = {path for paths in self.images.values() for path in paths}
        if any(path not in same for key in self.images.keys() & self.unlabeled.keys() for path in self.unlabeled[key]):
            # Two folders that both count from 0001. No mask needs to find an unlabelled image, so any id will do.
            self.unlabeled = {
                normalized(path.relative_to(raw).with_suffix("").as_posix()): [path]
                for paths in self.unlabeled.values()
                for path in paths
            }

    def _keep_apart(self, found: dict[str, list[Found]]) -> None:
        """Takes from what a setting found the files of a narrower one: `{id}.png` finds no masks `{id}_mask.png`.

        Raises DataError if neither of two settings that find one file is the narrower one.
        """
        paths = {setting: {file.path for file in files} for setting, files in found.items()}
        for first, second in combinations(paths, 2):
            both = paths[first] & paths[second]
            if not both or (first, second) == ("images", "unlabeled"):  # these are compared by their ids
                continue
            if len(both) == min(len(paths[first]), len(paths[second])) < max(len(paths[first]), len(paths[second])):
                wider = max(first, second, key=lambda setting: len(paths[setting]))
                found[wider] = [file for file in found[wider] if file.path not in both]
            else:
                raise DataError(
                    f"{min(both)}: a file has one purpose, but splits.{self.name}.{first} and splits.{self.name}.{second} "
                    "both find it; narrow one of them."
                )

    def _train_id(self, label: str) -> int | None:
        return self.classes.index(label) if label else None

    @staticmethod
    def _must_be_long(
        images: Sequence[Found], masks: Mapping[str, Sequence[Found]], others: Iterable[Sequence[Found]]
    ) -> bool:
        short, full = ([_by_id(files, long) for files in (images, *masks.values(), *others)] for long in (False, True))
        if not any(map(_repeat, short)):
            return False
        # The masks of one image may lie in folders of their own, one for each class or object. Then only the names of masks
        # repeat, and with their folders none of them belongs to an image.
        pairs = [
            bool(by_id[0].keys() & {key for mask_ids in by_id[1 : 1 + len(masks)] for key in mask_ids})
            for by_id in (short, full)
        ]
        return not (pairs == [True, False] and not _repeat(short[0]))

    def masks_of(self, key: str) -> list[MaskFile]:
        """Returns the mask files of an id, in the order of the classes."""
        if key in self.described:
            return [self.described[key]]
        return [
            MaskFile(str(path), self._train_id(label))
            for label, by_id in self.masks.items()
            for path in by_id.get(key, ())
        ]

    def paths(self, key: str) -> list[Path]:
        """Returns all files of an id."""
        masks = [Path(mask.path) for mask in self.masks_of(key)]
        return [*self.images.get(key, ()), *masks, *self.unlabeled.get(key, ()), *self.fields.get(key, ())]

    def chosen(self) -> list[str]:
        """Returns the ids that `list`, `include` and `exclude` leave, sorted. Raises DataError if one of them matches nothing."""
        split, with_image = self.split, self.images.keys() | self.unlabeled.keys()
        ids = with_image.union(*self.masks.values())
        for setting in ("include", "exclude"):
            for pattern in getattr(split, setting):
                if not any(_matches(key, pattern) for key in ids):
                    raise DataError(
                        f"{self.raw}: splits.{self.name}.{setting} {pattern!r} must match ids, but matches none; they look "
                        f"like {min(ids)!r}."
                    )
        if split.list is not None:
            ids = {*listed_ids(self.raw / split.list, sorted(with_image), f"split {self.name}")}
        return sorted(
            key
            for key in ids
            if any(_matches(key, pattern) for pattern in split.include)
            and not any(_matches(key, pattern) for pattern in split.exclude)
        )


def _matches(key: str, pattern: str) -> bool:
    # Equal text first: an id may hold brackets.
    return key == normalized(pattern) or fnmatchcase(key, normalized(pattern))


def _repeat_findings(files: _SplitFiles, ids: Iterable[str]) -> dict[str, list[Finding]]:
    """Returns the findings, one for each file, of the ids that do not mean one image with its masks."""
    findings = {}
    for key in ids:
        repeated = [
            by_id[key] for by_id in (files.images, files.unlabeled, files.fields) if len(by_id.get(key, ())) > 1
        ]
        several = [
            (label, by_id[key])
            for label, by_id in files.masks.items()
            # Masks of one class unite if the whole id says that they belong to one image.
            if len(by_id.get(key, ())) > 1 and not (label and files.long_ids)
        ]
        if several and not repeated and key in files.images:
            label, paths = several[0]
            found = f"an image of split {files.name} must have one mask, but {key!r} has {len(paths)}"
            remedy = (
                "say with `{id}` which part of the path is the image's, as in masks/*/{id}.png"
                if label
                else "if each holds a class or an object, name the class, which unites them: "
                f"`masks: {{{files.classes[-1]}: PATTERN}}`; if one of them is the mask, narrow the pattern"
            )
            findings[key] = [
                Finding("several masks for one image", str(path), found, remedy, whole_split=True) for path in paths
            ]
        elif repeated or several:
            names = [str(path.relative_to(files.raw)) for path in [*repeated, *(paths for _, paths in several)][0]]
            found = f"an id must mean one image of split {files.name}, but {key!r} means {first_few(names)}"
            remedy = (
                "rename all but one, narrow the patterns, or let `{id}` take in the folders, as images/{id}.png does"
            )
            findings[key] = [Finding("ids repeat", str(path), found, remedy) for path in files.paths(key)]
    return findings


def _unpaired_findings(files: _SplitFiles, ids: Sequence[str]) -> list[Finding]:
    """Returns the findings of images without a mask, or without a mask of ignored pixels, and of masks without an image."""
    masked = {key for key in ids if files.masks_of(key)}
    rule = f"in split {files.name} every image must have a mask of its id"

    def findings(
        kind: str, keys: list[str], by_id: Mapping[str, Sequence[Path]], found: str, remedy: str
    ) -> list[Finding]:
        count = f"(of {len(keys)} such)"
        return [Finding(kind, str(path), found.format(key, count), remedy) for key in keys for path in by_id[key]]

    fix = "fix the patterns"
    unmasked = (
        [] if REST in files.split.unlabeled else [key for key in ids if key in files.images and key not in masked]
    )
    result = findings(
        "no mask", unmasked, files.images, f"{rule}, but {{!r}} has none {{}}",
        f"add the mask, {fix}, or take such images as unlabelled: `unlabeled: rest`",
    )  # fmt: skip
    for by_id in files.masks.values():
        alone = [key for key in ids if key in by_id and key not in files.images]
        result += findings(
            "no image", alone, by_id, f"{rule}, but the mask {{!r}} has no image {{}}", f"add the image, or {fix}"
        )
    if files.split.ignore_masks:
        bare = [key for key in ids if key in masked and key in files.images and key not in files.fields]
        rule = f"in split {files.name} every labelled image must have one of the `ignore_masks`"
        result += findings(
            "no ignore mask", bare, files.images, f"{rule}, but {{!r}} has none {{}}", f"add it, or {fix}"
        )
    return result


def _read_coco(files: _SplitFiles, recipe: Recipe) -> list[Finding]:
    """Takes over what the split's COCO file says of its images; returns a warning if it lists others. Raises DataError."""
    path = str(files.raw / (files.split.coco or ""))
    coco = read_coco(path)
    train_ids = coco_train_ids(coco, recipe.reader().outlines.labels)
    # By the names of the files, exactly: lists are read more kindly, but here another photo would get the outlines.
    named: dict[str, list[tuple[str, str]]] = {}
    for key, paths in files.images.items():
        for file in paths:
            named.setdefault(normalized(file.name), []).append((key, normalized(file.as_posix())))
    lost = []
    for image in coco.images:
        name = normalized(image.name)
        same = named.get(name.rpartition("/")[2], [])
        parts = name.split("/")
        # The longest end counts: the first folders may be those of another machine.
        ends = ("/".join(parts[at:]) for at in range(len(parts)))
        fitting = ([key for key, file in same if file.endswith(f"/{end}")] for end in ends)
        meant = next((keys for keys in fitting if keys), [])
        if len(meant) > 1:
            raise DataError(
                f"{path}, image {image.name!r}: must be one file, but may be {first_few(sorted(meant))}; let `{ID}` take in "
                "the folders, as images/{id}.jpg does."
            )
        if meant and meant[0] in files.described:
            raise DataError(
                f"{path}, image {image.name!r}: is {meant[0]!r}, as another image of this file; export it again."
            )
        if meant:
            files.described[meant[0]] = MaskFile(path, None, image.annotation, tuple(train_ids.items()))
        else:
            lost.append(image.name)
    if not lost:
        return []
    found = f"every image that it lists should be in split {files.name}, but {len(lost)} of {len(coco.images)} are not ({first_few(lost)})"
    return [Finding("image is missing", path, found, "get the photos, if they are in no other split", fatal=False)]


def split_sources(
    raw: Path, name: str, recipe: Recipe, findings: list[Finding], notes: list[str]
) -> tuple[Source, ...]:
    """Returns the sources of a split, sorted by id; files that cannot be paired are appended to `findings`."""
    files = _SplitFiles(raw, name, recipe)
    chosen, split = files.chosen(), files.split
    if not chosen:
        raise DataError(f"{raw}: split {name} must have images, but `list`, `include` and `exclude` leave none.")
    both = [key for key in chosen if key in files.images and key in files.unlabeled]
    if both:
        raise DataError(
            f"{raw}: in split {name} images are labelled or unlabelled, but both list {first_few(both)}; those of `images` "
            "that have no mask are `unlabeled: rest`."
        )
    if split.coco is not None:
        findings += _read_coco(files, recipe)
    repeated = _repeat_findings(files, chosen)
    ids = [key for key in chosen if key not in repeated]
    images, masks = (
        [key for key in chosen if key in found] for found in (files.images, set().union(*files.masks.values()))
    )
    if images and masks and not {*images} & {*masks}:
        raise DataError(
            f"{raw}: in split {name} no mask belongs to an image: ids of images look like {images[0]!r}, of masks like "
            f"{masks[0]!r}; mark with `{ID}` what their paths have in common."
        )
    findings += [finding for key in repeated for finding in repeated[key]] + _unpaired_findings(files, ids)
    sources = []
    for key in ids:
        mask_files, fields = tuple(files.masks_of(key)), files.fields.get(key)
        if key in files.unlabeled:
            sources.append(Source(split.prefix + key, str(files.unlabeled[key][0])))
        elif key in files.images and mask_files and (fields or not split.ignore_masks):
            field_of_view = str(fields[0]) if fields else None
            sources.append(Source(split.prefix + key, str(files.images[key][0]), mask_files, field_of_view))
        elif key in files.images and not mask_files and REST in split.unlabeled:
            sources.append(Source(split.prefix + key, str(files.images[key][0])))
    with_folders = [key for key in chosen if "/" in key]
    if files.long_ids and with_folders:
        notes.append(f"ids of split {name} hold folders, as file names repeat: {with_folders[0]}")
    if REST in split.unlabeled:
        rest = sum(not source.masks for source in sources) - sum(key in files.unlabeled for key in ids)
        notes.append(f"split {name}: {rest} images have no mask, and are unlabelled")
    return tuple(sorted(sources, key=lambda source: source.id))
