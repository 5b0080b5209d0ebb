"""What a bundle says of its making: a CycloneDX bill of materials, and provenance in SLSA's form.

Both are pure functions of the inputs' digests and the tools' versions: no clock, no host name, no path, so
that a rebuild gives the same bytes. Specifications: CycloneDX 1.6 (machine-learning-model components),
in-toto Statement v1 with the predicate https://slsa.dev/provenance/v1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from vera_edge.storage.json_text import canonical_json

BUILD_TYPE = "urn:vera-edge:release:v1"


@dataclass(frozen=True)
class Material:
    """One input of a bundle: `kind` is "base" or "adapter"; `digest` is a hex SHA-256."""

    kind: str
    name: str
    digest: str
    licence: str | None = None


def sbom(
    name: str, version: str, artefact_digest: str, materials: tuple[Material, ...], tools: Mapping[str, str]
) -> bytes:
    """A CycloneDX 1.6 JSON bill of materials: the artefact, what it was made from, the tools that made it."""
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    def component(kind: Any, name: str, version: str, reference: str, **more: Any) -> Any:
        return Component(name=name, version=version, type=kind, bom_ref=reference, **more)

    def sha256(digest: str) -> list[Any]:
        return [HashType(alg=HashAlgorithm.SHA_256, content=digest)]

    bom = Bom()
    bom.serial_number = uuid5(NAMESPACE_URL, f"{BUILD_TYPE}/{artefact_digest}")
    bom.metadata.timestamp = None
    model = ComponentType.MACHINE_LEARNING_MODEL
    root = component(model, name, version, "artefact", hashes=sha256(artefact_digest))
    bom.metadata.component = root
    parts = [
        component(
            model,
            material.name,
            material.digest[:16],
            f"{material.kind}:{material.name}",
            hashes=sha256(material.digest),
            licenses=_licences(material.licence),
        )
        for material in materials
    ]
    parts += [
        component(ComponentType.LIBRARY, tool, release, f"tool:{tool}") for tool, release in tools.items()
    ]
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(root, parts)
    return canonical_json(json.loads(JsonV1Dot6(bom).output_as_string()))


def _licences(expression: str | None) -> list[Any]:
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [] if expression is None else [LicenseFactory().make_from_string(expression)]


def provenance(
    name: str,
    artefact_digest: str,
    parameters: Mapping[str, Any],
    materials: tuple[Material, ...],
    tools: Mapping[str, str],
) -> bytes:
    """An in-toto statement with SLSA provenance v1: subject, the parameters that made it, its inputs."""
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": artefact_digest}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": dict(parameters),
                "internalParameters": {},
                "resolvedDependencies": [
                    {"name": f"{material.kind}:{material.name}", "digest": {"sha256": material.digest}}
                    for material in materials
                ],
            },
            "runDetails": {"builder": {"id": BUILD_TYPE, "version": dict(tools)}},
        },
    }
    return canonical_json(statement)
