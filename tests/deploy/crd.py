"""Validation of custom resources against a CRD's own schema, unknown fields refused."""

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

KINDS = {"RayJob": "rayjobs", "RayCluster": "rayclusters", "RayService": "rayservices"}


def strict(schema: Any) -> Any:
    """The structural schema as JSON schema: fields it does not name are refused, where the API server would
    silently prune them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    listed = isinstance(schema.get("properties"), dict) and "type" in schema
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if listed and not open_ended:
        out["additionalProperties"] = False
    return out


@cache
def validator(folder: Path, kind: str, wanted: str) -> jsonschema.Draft202012Validator:
    """For one kind in one served version."""
    crd = yaml.load((folder / f"ray.io_{KINDS[kind]}.yaml").read_text(), Loader=yaml.CSafeLoader)
    (version,) = (entry for entry in crd["spec"]["versions"] if entry["name"] == wanted and entry["served"])
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What the CRD's schema has against the manifest, one line each."""
    wanted = manifest["apiVersion"].partition("/")[2]
    errors = validator(folder, manifest["kind"], wanted).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]
