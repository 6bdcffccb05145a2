"""`python -m cps_ray.schema sweep`: prints the JSON schema of a sweep, or of a training, with which editors complete and check files.

    python -m cps_ray.schema sweep > schema.json

An editor with a YAML language server takes it from the first line of sweeps/mine.yaml: `# yaml-language-server: $schema=../schema.json`.
It knows settings, types and bounds; rules over several settings are checked when the file is read.
"""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from cps_ray.command import command_parser, entry, run_command
from cps_ray.config.reader import presets
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig

_KINDS = {"sweep": SweepConfig, "train": TrainConfig}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a schema, and returns the exit code."""
    parser = command_parser("schema", __doc__)
    parser.add_argument("kind", choices=_KINDS, help="kind of file")
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    print(json.dumps(json_schema(args.kind), indent=1))
    return 0


def json_schema(kind: str) -> dict[str, Any]:
    """Returns the JSON schema of a `sweep` or a `train` file. Where a training names a preset, it requires no other setting."""
    training = TrainConfig.model_json_schema()
    definitions = training.pop("$defs")
    training["properties"]["preset"] = {
        "enum": presets(),
        "description": "Shipped training that the settings beside it change.",
    }
    text = re.sub(r'"#/\$defs/(\w+)"', r'"#/$defs/\1-on-preset"', json.dumps({**definitions, "Training": training}))
    on_preset = json.loads(text, object_hook=lambda node: {key: node[key] for key in node if key != "required"})
    schema = (
        SweepConfig.model_json_schema() if kind == "sweep" else {"$ref": "#/$defs/TrainConfig", "$defs": definitions}
    )
    schema["$defs"] |= {f"{name}-on-preset": definition for name, definition in on_preset.items()}
    schema["$defs"] |= {
        "Training": training,
        "TrainConfig": {
            "if": {"required": ["preset"]},
            "then": {"$ref": "#/$defs/Training-on-preset"},
            "else": {"$ref": "#/$defs/Training"},
        },
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


if __name__ == "__main__":
    entry(main)
