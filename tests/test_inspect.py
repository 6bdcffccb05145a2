"""The command `inspect`: what it reports on healthy and on damaged shards, and what it writes."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cps_ray.datasets.images import decode_mask, encode_mask
from cps_ray.datasets.prepare import checks
from cps_ray.datasets.prepare.findings import summary_lines
from cps_ray.datasets.shards import open_shards, sha256
from cps_ray.inspect import main

ALL = ("contact-test.png", "contact-train.png", "contact-val.png", "index.html")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards, for tests to damage."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture
def rare(folder: Path) -> str:
    """Returns the id of a training image whose mask lacks a class that other masks show."""
    index = open_shards(folder).index("train")
    row = int(np.flatnonzero(~index.presence.all(axis=1))[0])
    return index.ids[row]


def written(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in (folder.parent / "shards-inspect").iterdir()))


def cells(output: str) -> dict[str, list[str]]:
    """Returns the rows of the printed table by their first cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def page_text(folder: Path) -> str:
    parser, texts = HTMLParser(), []
    parser.handle_data = texts.append  # type: ignore[method-assign]
    parser.feed((folder.parent / "shards-inspect/index.html").read_text())
    return " ".join(texts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest without its checksum, so that an edited one is accepted."""
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    content.pop("sha256", None)
    return content


def rewritten(folder: Path, split: str, **columns: list[object]) -> None:
    """Puts other values into an index, as if it had been prepared with them."""
    manifest = read_manifest(folder)
    path = folder / manifest["splits"][split]["index"]
    table = pq.read_table(path)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)
    manifest["splits"][split]["index_sha256"] = sha256(path.read_bytes()).hex()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_healthy_shards(folder: Path, capsys: Capture) -> None:
    assert main([str(folder)]) == 0
    output = capsys.readouterr()
    rows = cells(output.out)
    assert rows["images"] == rows["masks"] == ["24", "6", "6"]
    assert rows["unlabelled"] == ["0", "0", "0"]
    assert rows["sizes"] == ["48x32 (24)", "48x32 (6)", "48x32 (6)"]
    split = open_shards(folder).manifest.splits["train"]
    percentage = 100 * split.class_pixels[0] / sum(split.class_pixels)
    assert rows["sky"][0] == f"{percentage:.2f} ({split.class_images[0]})"
    assert "error" not in output.out + output.err
    assert written(folder) == ALL
    for name in ALL:
        assert str(folder.parent / "shards-inspect" / name) in output.out.replace("\n", "")
    for name in ALL[:3]:
        assert Image.open(folder.parent / "shards-inspect" / name).size[0] >= 1000
    assert "Every file matches its checksum" in page_text(folder)


def test_a_flipped_byte_in_an_image_is_found_and_the_rest_is_shown(folder: Path, capsys: Capture) -> None:
    locations = open_shards(folder).index("train").locations
    path = Path(locations.files[0])
    data = bytearray(path.read_bytes())
    data[int(locations.image[3].sum()) - 20] ^= 1
    path.write_bytes(data)
    assert main([str(folder)]) == 2
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if line.startswith(f"error: {path}: ")]
    assert len(lines) == 2
    assert any(f"the image of {locations.ids[3]}" in line and "checksum" in line for line in lines)
    assert any("sha256" in line and "manifest" in line for line in lines)
    assert all(line.endswith("; prepare the data set again.") for line in lines)
    assert output.err.startswith("error: ")
    assert output.err.strip().count("\n") == 0
    assert written(folder) == ALL
    assert "checksum" in page_text(folder)
    assert "Every file matches" not in page_text(folder)


def test_a_flipped_byte_that_is_in_no_image_is_found(folder: Path, capsys: Capture) -> None:
    path = folder / "val-00000.parquet"
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    assert main([str(folder)]) == 2
    assert capsys.readouterr().out.count("error: ") == 1


def test_a_file_that_grew_is_found(folder: Path, capsys: Capture) -> None:
    path = folder / "val-00000.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"x")
    assert main([str(folder)]) == 2
    assert f"error: {path}: the file has {size + 1} bytes, but the manifest says {size}; " in capsys.readouterr().out


def test_a_missing_file_is_one_line(folder: Path, capsys: Capture) -> None:
    (folder / "val-00000.parquet").unlink()
    assert main([str(folder)]) == 2
    output = capsys.readouterr().out
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    found = "the file is missing or cannot be read; prepare the data set again."
    assert errors == [f"error: {folder}/val-00000.parquet: {found}"]
    assert cells(output)["images"] == ["24", "6", "6"]
    assert written(folder) == ALL


def test_a_damaged_index_hides_its_split_alone(folder: Path, capsys: Capture) -> None:
    path = folder / "test.index.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert main([str(folder)]) == 2
    output = capsys.readouterr().out
    assert f"error: {path}: does not match its checksum in manifest.json; prepare the data set again." in output
    assert cells(output)["images"] == ["24", "6"]
    assert written(folder) == (ALL[1], ALL[2], ALL[3])


def test_masks_and_sizes_that_contradict_the_index_are_found(folder: Path, capsys: Capture) -> None:
    table = pq.read_table(folder / "val.index.parquet")
    pixels, heights = table["pixels"].to_pylist(), table["height"].to_pylist()
    pixels[2][0] -= 1
    heights[4] += 1
    rewritten(folder, "val", pixels=pixels, height=heights)
    assert main([str(folder)]) == 2
    output = capsys.readouterr().out
    ids = table["id"].to_pylist()
    assert f"the mask of {ids[2]} has other numbers of pixels per class than the index says" in output
    assert f"the image of {ids[4]} has 48x32 px, but the index says 48x33" in output
    assert f"the mask of {ids[4]} has 48x32 px, but the index says 48x33" in output
    assert output.count("error: ") == 3


def test_mask_values_outside_the_class_table_are_found(folder: Path, capsys: Capture) -> None:
    index = open_shards(folder).index("val")
    path = Path(index.locations.files[0])
    row = int(np.argmax(index.locations.mask[:, 1]))
    first, count = map(int, index.locations.mask[row])
    data = path.read_bytes()
    mask = decode_mask(data[first : first + count])
    invalid = np.zeros_like(mask)
    invalid[0, :3] = (7, 8, 200)
    encoded = encode_mask(invalid)
    assert len(encoded) <= count
    encoded += bytes(count - len(encoded))  # PNG readers stop at its end
    path.write_bytes(data[:first] + encoded + data[first + count :])
    sums = pq.read_table(folder / "val.index.parquet")["mask_sha256"].to_pylist()
    sums[row] = sha256(encoded)
    rewritten(folder, "val", mask_sha256=sums)
    assert main([str(folder)]) == 2
    assert f"the mask of {index.ids[row]} should hold 0..6 and 255, but holds 7, 8, 200" in capsys.readouterr().out


def test_one_image_in_two_splits_is_fatal_and_many_lines_become_one(folder: Path, capsys: Capture) -> None:
    manifest = read_manifest(folder)
    manifest["splits"]["val"] = manifest["splits"]["train"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(folder)]) == 2
    output = capsys.readouterr().out
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "train/train_00000 and 23 more: an image must be in one split" in errors[0]
    listed = (folder.parent / "shards-inspect/findings.txt").read_text().splitlines()
    assert len(listed) == 24
    assert listed[23].startswith("train/train_00023: an image must be in one split")
    manifest["splits"].pop("val")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(folder), "--labeled", "6"]) == 0
    assert (folder.parent / "shards-inspect/contact-train-labeled.png").exists()
    assert main([str(folder)]) == 0
    for name in ("findings.txt", "contact-train-labeled.png"):
        assert not (folder.parent / "shards-inspect" / name).exists(), "of the call before"


def test_labels_that_lack_a_class_are_warned_about(folder: Path, rare: str, capsys: Capture) -> None:
    (folder.parent / "mine.txt").write_text(f"{rare}\n")
    index = open_shards(folder).index("train")
    shown = index.presence[index.ids.index(rare)]
    missing = [name for name, seen in zip(open_shards(folder).classes, shown, strict=True) if not seen]
    assert main([str(folder), "--labeled", str(folder.parent / "mine.txt")]) == 0
    output = capsys.readouterr().out
    (warning,) = (line for line in output.splitlines() if line.startswith("warning: labelled"))
    assert f"no labelled mask shows {', '.join(missing)}: no label teaches it" in warning
    assert cells(output)["images"] == ["24", "1", "6", "6"]
    assert all(cells(output)[name][1] == "- (0)" for name in missing)
    assert written(folder) == ("contact-test.png", "contact-train-labeled.png", "contact-train.png", *ALL[2:])
    assert "no labelled mask shows" in page_text(folder)


def test_a_labelled_image_without_a_mask_is_fatal(folder: Path, capsys: Capture) -> None:
    table = pq.read_table(folder / "train.index.parquet")
    sizes = table["mask_bytes"].to_pylist()
    sizes[7] = 0
    rewritten(folder, "train", mask_bytes=sizes)
    (folder.parent / "mine.txt").write_text("train_00007\ntrain_00008\n")
    assert main([str(folder), "--labeled", str(folder.parent / "mine.txt")]) == 2
    output = capsys.readouterr().out
    assert "every labelled image must have a mask, but 1 have none (train_00007)" in output
    assert cells(output)["unlabelled"] == ["1", "1", "0", "0"]
    assert "no mask" in page_text(folder)


def test_a_warning_that_preparing_noted_is_no_note_too(folder: Path, capsys: Capture) -> None:
    manifest = read_manifest(folder)
    manifest["classes"].append("ghost")
    manifest["palette"].append([1, 2, 3])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    opened = open_shards(folder)
    found = checks.check_prepared({split: opened.index(split) for split in manifest["splits"]}, opened.classes)
    manifest["notes"] = summary_lines(found)
    assert "ghost" in manifest["notes"][0]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(folder)]) == 0
    output = capsys.readouterr().out
    assert output.count("no mask shows ghost") == output.count("warning: ") == 3
    assert "note: " not in output


@pytest.mark.parametrize(("wanted", "count"), [("6", "6"), ("0.5", "12"), ("mine", "2")])
def test_the_labelled_part_is_a_count_a_fraction_or_a_name(
    folder: Path, wanted: str, count: str, capsys: Capture
) -> None:
    (folder / "subsets/mine").mkdir(parents=True)
    (folder / "subsets/mine/labeled.txt").write_text("train_00004\ntrain_00011\n")
    assert main([str(folder), "--labeled", wanted, "--seed", "2"]) == 0
    assert cells(capsys.readouterr().out)["masks"] == ["24", count, "6", "6"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no shards here"),
        (["shards", "--labeled", "yours"], "no subset named 'yours' here"),
        (["shards", "--labeled", "1.5"], "--labeled must be a count of at least 1 or a fraction in (0, 1], but is 1.5"),
        (["shards", "--labeled", "none.txt"], "none.txt"),
        (["shards", "--output", "shards/manifest.json"], "shards/manifest.json: cannot be made"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(
    folder: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert message in output.err
    assert output.err.strip().count("\n") == 0
    assert output.out == ""


def test_what_preparing_noted_and_left_out_is_reported_once(folder: Path, capsys: Capture) -> None:
    manifest = read_manifest(folder)
    manifest["classes"][0] = "<sky> & [b]more"
    manifest["notes"] = ["val was held out of train"]
    manifest["left_out"] = [{"file": "raw/<odd>.png", "why": "is empty"}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rewritten(folder, "val", image_sha256=[bytes([k]) * 32 for k in range(6)])
    assert main([str(folder), "--output", str(folder.parent / "shards-inspect")]) == 2
    output = capsys.readouterr().out
    assert "note: val was held out of train" in output
    assert "<sky> & [b]more" in cells(output)
    text = page_text(folder)
    assert "raw/<odd>.png: is empty" in text
    assert "<sky> & [b]more" in text
    assert not re.search("<sky>", (folder.parent / "shards-inspect/index.html").read_text())
    assert "None can be read." in text
