"""Encoder weights from a local file: found in it by the tails of names, whatever stands before them."""

import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from cps_ray.errors import CheckpointError
from cps_ray.text import first_few, first_line, in_words, printable

_COUNTER = "num_batches_tracked"  # of BatchNorm; files from before torch 0.4.1 lack it, and only momentum=None reads it
_IN_FOLDER = "model.safetensors"  # of smp's save_pretrained, and of our best/
_WRAPPERS = ("model.model.", "model.body.", "model.")
"""What smp and timm's feature extractors put before the names of timm's model."""
_FIRST = {"teacher", "ema", "average"}
_LAST = {"student", "momentum", "target", "k"}
"""Words in prefixes of files with several networks: averages, which are what one uses, and those that only serve to train others."""
_SAVE_TENSORS = (
    "import sys, torch; f = lambda v: v if isinstance(v, torch.Tensor) else f(v.state_dict()) if isinstance(v, torch.nn.Module) "
    "else {str(k): f(x) for k, x in v.items()} if isinstance(v, dict) else {}; "
    "torch.save(f(torch.load(sys.argv[1], 'cpu', weights_only=False)), sys.argv[2])"
)
"""A program for a file that holds more than tensors: saves its tensors alone, in the same dictionaries."""


@dataclass(frozen=True, slots=True)
class _Fill:
    """What a file has under one prefix for an encoder."""

    prefix: str
    tensors: dict[str, Tensor]
    """Key of the encoder -> tensor."""
    names: frozenset[str]
    """Names of these tensors in the file."""
    fits: int
    """Tensors of the encoder that are there as they must be, without counters."""
    fault: str
    """Why this is not the encoder, or ""."""


def load_encoder(encoder: nn.Module, name: str, path: Path) -> str:
    """Fills an encoder from a file of safetensors or torch.save, read without unpickling code; returns in words what came from where.

    `name` is the encoder's as in the config. The file may hold whole models and trainings. Under one prefix (`module.encoder_q.`) it must
    have every tensor of the encoder once, in its shape, named as in the encoder's own state or, for a `tu-` encoder, as in timm's model.
    Where several prefixes do, averages (teacher, ema) come first and those that only serve others (student, momentum, target, encoder_k) last;
    then the one of the fewest parts, then the first by name. Raises CheckpointError.
    """
    file = path / _IN_FOLDER if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: model.weights_file does not exist. Paths are relative to the config file.")
    tensors = [*_tensors(_read(file))]
    own: dict[str, Tensor] = encoder.state_dict()
    fills = sorted(_fills(own, name, tensors), key=_order)
    fitting = [fill for fill in fills if not fill.fault]
    if not fitting:
        detail = _closest(fills, own, tensors)
        raise CheckpointError(
            f"{file}: every tensor of the encoder {name} must be in it, but {printable(detail)}. Choose the encoder this file was made for."
        )
    used, *others = fitting
    encoder.load_state_dict(own | used.tensors)
    left = [full for full, _ in tensors if full not in used.names]
    under = f" under {used.prefix}" if used.prefix else ""
    also = f" ({first_few([fill.prefix or 'no prefix' for fill in others])} would fit, too)" if others else ""
    rest = (
        f"{len(left)} tensor{'s'[: len(left) > 1]} not used: {_short(left, used.prefix)}"
        if left
        else "no tensor left over"
    )
    return printable(f"{name} filled by {len(used.names)} tensors of {path.name}{under}{also}; {rest}")


def _read(path: Path) -> Any:
    """Returns what a file holds, by its content whatever its suffix. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read as weights: {printable(in_words(err))}.") from err
    try:
        if head[8:9] == b"{":  # after the length of the header
            from safetensors.torch import load_file

            return load_file(path)
        # A zip archive, or what files of before torch 1.6 begin with.
        if head.startswith(b"PK") or torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in head:
            with path.open("rb") as file:  # of a path, torch would read the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged file raises one of many types
        # What could run code is refused so by torch; what is damaged may look like it, but not to zip.
        refused = isinstance(err, UnpicklingError) or "TorchScript" in str(err)
        if refused and ("GLOBAL" in str(err) or zipfile.is_zipfile(path)):
            raise CheckpointError(f"{path}: {_how_to_save_tensors(err, path)}") from err
        raise CheckpointError(f"{path}: cannot be read as weights: {printable(_damage(err, path))}.") from err
    raise CheckpointError(f"{path}: cannot be read as weights: {_other_kind(head)}.")


def _how_to_save_tensors(err: Exception, path: Path) -> str:
    found = re.search(r"GLOBAL (\S+)", str(err))
    what = f"Python objects ({printable(found[1])})" if found else "a program or a pickle of another form"
    files = " ".join(shlex.quote(str(file)) for file in (path, path.with_name(f"{path.stem}-tensors.pt")))
    return (
        f"holds {what} beside tensors, and reading those can run any code. If you trust the file, save its tensors alone, where the "
        f'software that wrote it is installed, and name the new file: python -c "{_SAVE_TENSORS}" {files}'
    )


def _damage(err: Exception, path: Path) -> str:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "it is an archive of other files; unpack it"
    return f"it is cut short or damaged ({first_line(err)[:100].rstrip('. ')}); copy or download it again"


def _other_kind(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it only points to a file in Git LFS, which `git lfs pull` fetches"
    if head.lstrip().startswith(b"<"):
        return "it is a web page; download the file that the page is about"
    return "it is neither a file of safetensors nor one of torch.save"


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors in nested dictionaries with their keys, joined by dots."""
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            else:
                yield from _tensors(value, f"{prefix}{key}.")


def _fills(own: dict[str, Tensor], name: str, tensors: list[tuple[str, Tensor]]) -> Iterator[_Fill]:
    """Yields what each prefix has for the encoder, for all prefixes under which there is a name of the encoder's."""
    of_timm = name.startswith("tu-")
    wrapper = next((w for w in _WRAPPERS if of_timm and all(key.startswith(w) for key in own)), "")
    keys = {key.removeprefix(wrapper): key for key in own}
    found: dict[str, dict[str, list[tuple[str, Tensor]]]] = {}
    for full, value in tensors:
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", full))):
            tail = full[start:]
            # timm's FeatureListNet makes the children of a Sequential its own: stages.0 -> stages_0
            for spelling in (tail, _flat(tail)) if of_timm else (tail,):
                if spelling in keys:
                    found.setdefault(full[:start], {}).setdefault(spelling, []).append((full, value))
                    break
    for prefix, there in found.items():
        faults = {tail: _fault(tail, there.get(tail, []), own[key]) for tail, key in keys.items()}
        names = frozenset(full for same in there.values() for full, _ in same)
        fits = sum(not fault for tail, fault in faults.items() if not tail.endswith(_COUNTER))
        fault = next(filter(None, faults.values()), "")
        if not fault:
            rest = {
                full.removeprefix(prefix): v for full, v in tensors if full.startswith(prefix) and full not in names
            }
            fault = _another(rest, {tail.split(".")[0] for tail in keys}, name)
        yield _Fill(prefix, {keys[tail]: same[0][1] for tail, same in there.items()}, names, fits, fault)


def _flat(tail: str) -> str:
    return tail.replace(".", "_", 1)


def _fault(tail: str, found: list[tuple[str, Tensor]], own: Tensor) -> str:
    """Returns why what was found for a tensor of the encoder cannot be it, or ""."""
    if not found:
        return "" if tail.endswith(_COUNTER) else f"{tail} is lacking"
    if len(found) > 1:
        return f"{tail} is there more than once ({first_few([full for full, _ in found])})"
    (_, value), *_ = found
    if value.shape != own.shape:
        return f"{tail} has shape {tuple(value.shape)} instead of {tuple(own.shape)}"
    if value.is_floating_point() != own.is_floating_point() or value.layout != own.layout:
        return f"{tail} is of {value.dtype}, {value.layout} instead of {own.dtype}, {own.layout}"
    return ""


def _another(rest: dict[str, Tensor], parts: set[str], name: str) -> str:
    """Returns what tells that a prefix is of a larger encoder, or "". `rest`: tensors beside those of the encoder; `parts`: of the encoder."""
    further = {tail: v for tail, v in rest.items() if {tail.split(".")[0], _flat(tail).split(".")[0]} & parts}
    if further and name.startswith("tu-"):
        # An encoder of few maps is timm's model cut short.
        import timm

        with torch.device("meta"):  # shapes without memory
            whole = timm.create_model(name.removeprefix("tu-")).state_dict()
        further = {tail: v for tail, v in further.items() if tail not in whole or whole[tail].shape != v.shape}
    return f"{first_few([*further])} would be left over: the file is of another encoder" if further else ""


def _order(fill: _Fill) -> tuple[int, int, str]:
    words = {*re.split(r"[._]", fill.prefix)}
    return (0 if words & _FIRST else 2 if words & _LAST else 1), fill.prefix.count("."), fill.prefix


def _closest(fills: list[_Fill], own: dict[str, Tensor], tensors: list[tuple[str, Tensor]]) -> str:
    """Returns what is wrong with the prefix that comes closest."""
    if not tensors:
        return "it holds no tensors with names"
    if not fills:
        return f"its {len(tensors)} tensors have other names ({first_few([full for full, _ in tensors])})"
    best = max(fills, key=lambda fill: fill.fits)
    needed = sum(not key.endswith(_COUNTER) for key in own)
    under = f"under {best.prefix} " if best.prefix else ""
    return f"{under}{best.fits} of {needed} tensors fit; {best.fault}"


def _short(names: list[str], prefix: str) -> str:
    """Returns names by their first part, or by the first that is not the prefix's, with counts: `fc.* (2), queue`."""
    chosen = prefix.split(".")[:-1]
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        same = next(
            (i for i, (ours, theirs) in enumerate(zip(chosen, parts, strict=False)) if ours != theirs), len(chosen)
        )
        counts[".".join(parts[: same + 1]) + (".*" if len(parts) > same + 1 else "")] += 1
    return first_few([f"{group} ({count})" if count > 1 else group for group, count in counts.items()])
