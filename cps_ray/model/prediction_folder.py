"""The folder of predictions: what it was made with, what of it is complete, and its tables."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cps_ray import __version__
from cps_ray.config.train import ENSEMBLE
from cps_ray.errors import DataError
from cps_ray.files import read_json, write_json, write_text
from cps_ray.model.model import Model
from cps_ray.model.photos import Photo
from cps_ray.model.predicting import OutputOptions, Record
from cps_ray.text import printable

SETTINGS_FILE = "predict.json"
RECORDS_FILE = "predicted.jsonl"
INDEX_FILE = "index.csv"
FAILED_FILE = "failed.csv"


class PredictionFolder:
    """OUT of `predict`. Records are appended chunk by chunk, after the files they speak of: what has one is complete."""

    def __init__(self, folder: Path, model: Model, options: OutputOptions) -> None:
        """Makes the folder, or goes on in it. DataError if it holds anything but predictions of this model with these options."""
        self.folder = folder
        self._model, self._options = model, options
        settings = _settings(model, options)
        _check_is_ours(folder, settings)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS_FILE, settings)
        for unfinished in folder.glob("*/**/.*.tmp"):  # of a run that was killed
            unfinished.unlink(missing_ok=True)
        self._records = _read_records(folder / RECORDS_FILE)
        # Once more, since the last line may be half of one.
        write_text(folder / RECORDS_FILE, "".join(map(_line, self._records.values())))

    def complete(self, photos: Iterable[Photo]) -> dict[str, Record]:
        """Returns the records of those of the photos that are predicted, have not changed since, and whose files are all there.

        DataError if the name of a photo is taken by the prediction of a file elsewhere.
        """
        complete = {}
        for photo in photos:
            record, path = self._records.get(photo.name), os.path.abspath(photo.path)
            if record is None:
                continue
            if record["path"] != path:
                raise DataError(
                    f"{self.folder}: holds the prediction of {record['path']} by the name that {path} would have; name another folder."
                )
            is_same = (record["bytes"], record["mtime_ns"]) == (photo.bytes, photo.mtime_ns) and "error" not in record
            if is_same and all((self.folder / file).exists() for file in self._options.files(photo.name).values()):
                complete[photo.name] = record
        return complete

    def add(self, records: Sequence[Record]) -> None:
        """Appends the records of a chunk, all of them at once: a run that goes on finds the same chunks, so it predicts the same bytes."""
        with (self.folder / RECORDS_FILE).open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, records)))
        self._records |= {record["name"]: record for record in records}

    def write_tables(self, photos: Sequence[Photo]) -> int:
        """Writes index.csv and, if some photos could not be read, failed.csv, in the order of the photos. Returns how many could not."""
        records = [(photo, self._records[photo.name]) for photo in photos]
        failed = [(photo.path, record["error"]) for photo, record in records if "error" in record]
        good = [(photo, record) for photo, record in records if "error" not in record]
        compared = all("disagreement" in record for _, record in good)
        header = ["path", "width", "height", "certainty", "sure"]
        header += [f"fraction/{name}" for name in self._model.classes] + ["disagreement"] * compared
        rows = [
            [photo.path, *(record[name] for name in header[1:5]), *record["fractions"]]
            + ([record["disagreement"]] if compared else [])
            for photo, record in good
        ]
        write_text(self.folder / INDEX_FILE, _csv([header, *rows]))
        if failed:
            write_text(self.folder / FAILED_FILE, _csv([("path", "error"), *failed]))
        else:
            (self.folder / FAILED_FILE).unlink(missing_ok=True)
        return len(failed)


def _settings(model: Model, options: OutputOptions) -> dict[str, Any]:
    several = model.network == ENSEMBLE or options.disagreement
    used = [*model.description.networks] if several else [model.network]
    # An export of the model in another form changes nothing here.
    digest = hashlib.sha256(model.description.model_dump_json(exclude={"exports"}).encode())
    for name in used:
        with (model.folder / model.description.networks[name].file).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "version": 1,
        "made_by": f"cps_ray {__version__}",
        "model": str(model.folder.absolute()),
        "fingerprint": digest.hexdigest(),
        "network": model.network,
        "classes": [*model.classes],
        "options": asdict(options),
    }


def _check_is_ours(folder: Path, settings: dict[str, Any]) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: must be a folder for the predictions, but is a file; name another one.")
    try:
        before = read_json(folder / SETTINGS_FILE)
    except ValueError:
        before = {}
    if before is None:
        if folder.exists() and any(folder.iterdir()):
            raise DataError(
                f"{folder}: must be new, empty or of predictions, but holds other files; name another folder."
            )
        return
    if not isinstance(before, dict) or not isinstance(before.get("options"), dict) or before.get("version") != 1:
        raise DataError(f"{folder / SETTINGS_FILE}: must be as `predict` writes it, but is not; name another folder.")
    for name, value in settings["options"].items():
        if before["options"].get(name) != value:
            found = f"{name} {json.dumps(before['options'].get(name))}, not {json.dumps(value)}"
            raise DataError(
                f"{folder}: holds predictions made with {found}; give the same options, or name another folder."
            )
    if before.get("fingerprint") != settings["fingerprint"] or before.get("network") != settings["network"]:
        made_by = f"network {before.get('network')} of {before.get('model')}"
        raise DataError(
            f"{folder}: holds predictions of {made_by}, which is another network or has changed since; name another folder."
        )


def _read_records(path: Path) -> dict[str, Record]:
    """Returns the records by name; of several the last. A line that a kill has cut counts as none."""
    records = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            record = json.loads(line)
            records[record["name"]] = record
        except ValueError:
            continue
    return records


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
    )
    return text.getvalue()
