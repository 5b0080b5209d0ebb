"""A bundle's signature, and the key that is trusted. Signing isn't repeatable, so both lie in `signed/`."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.fuzzing.mutate import Form
from tests.fuzzing.target import Seed, Target
from vera_edge.bundle import signing
from vera_edge.bundle.contents import SIGNATURE

SIGNED = Path(__file__).parent / "signed"
KEY = "publisher.pem"


def _file(name: str, file: str, form: Form) -> Target:
    def prepare(folder: Path) -> None:
        shutil.copytree(SIGNED / "bundle", folder / "bundle")
        shutil.copy(SIGNED / KEY, folder)

    def read(seed: Seed, folder: Path) -> object:
        (folder / file).write_bytes(seed.data)
        return signing.check(folder / "bundle", signing.Trust(folder / KEY, required=True))

    return Target(name, form, lambda: [Seed((SIGNED / file).read_bytes())], read, prepare)


TARGETS = (
    _file("signature", f"bundle/{SIGNATURE}", Form.JSON),
    _file("trusted-key", KEY, Form.BINARY),
)
