"""One bundle of a release, from its inputs to the folder that is published: export, measure, gate, compose.

Each stage's result lies in the store under the digest of all that determines it, so nothing is done twice:
adapters of one base share one branch graph, and a changed limit doesn't export again. Whatever stops this
process, the next one takes up what is finished, sweeps away what isn't, and comes to the same bytes.
"""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vera_edge.bundle import contents as bundle
from vera_edge.bundle import signing
from vera_edge.bundle.contents import Manifest
from vera_edge.errors import OutputError, VeraEdgeError
from vera_edge.progress import Progress, silent
from vera_edge.releasing import artefact, evidence
from vera_edge.releasing import inputs as inputs_of
from vera_edge.releasing.cache import Store, key_of, only_one
from vera_edge.releasing.compose import EVIDENCE, PROVENANCE, Parts, compose, own_recipe
from vera_edge.releasing.evidence import Evidence
from vera_edge.releasing.job import ReleaseJob
from vera_edge.storage.files import (
    leftovers,
    make_folder,
    output_error,
    staged_folder,
    sweep,
    write_atomic,
)
from vera_edge.storage.json_text import canonical_json, read_json

LOCKS = ".locks"


@dataclass(frozen=True)
class Result:
    """What became of a job.

    state: "built", "unchanged", "stopped" (a gate was not passed) or "failed" (an input is at fault, or we
    are: then `trace` says where). size: bytes of the bundle; kl: mean KL from the reference, nats; retained:
    share of the effect kept. seconds: what this run spent on each stage. notes: sentences of this run for a
    person to read.
    """

    name: str
    state: str
    message: str = ""
    digest: str | None = None
    size: int | None = None
    kl: float | None = None
    retained: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    trace: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object, without what isn't known or is of this run only."""
        facts = {key: value for key, value in vars(self).items() if key not in ("seconds", "notes", "trace")}
        return {key: value for key, value in facts.items() if value not in (None, "")}


def run(job: ReleaseJob, progress: Progress = silent) -> Result:
    """Do one job. Whatever it ends in is a Result, never an error, so that the other jobs go on."""
    work = _Work(job, progress)
    try:
        result = work.run()
    except VeraEdgeError as error:
        result = Result(job.name, "failed", str(error))
    except OSError as cause:  # an input that went away, or that its disk doesn't give
        name = cause.filename or "a file"
        result = Result(
            job.name, "failed", f"{name} can't be used: {cause.strerror or cause}; mend that first"
        )
    except Exception as cause:  # a bug, ours or a library's
        message = f"{type(cause).__name__}: {' '.join(str(cause).split()) or 'no message'}"
        result = Result(job.name, "failed", message, trace="".join(traceback.format_exception(cause)))
    return replace(result, seconds=work.seconds, notes=work.notes)


def run_alone(job: ReleaseJob, progress: Progress = silent) -> Result:
    """Do one job, and let its errors through."""
    return _Work(job, progress).run()


class _Work:
    def __init__(self, job: ReleaseJob, progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.store = Store(job.store, job.fresh)
        self.target = job.out / job.name
        self.seconds: dict[str, float] = {}
        self.notes: tuple[str, ...] = ()

    def run(self) -> Result:
        job, store, progress = self.job, self.store, self.progress
        with self._timed("reading"):
            inputs = inputs_of.read(job, store)
            self.notes = inputs.notes
            asked = evidence.question(job, inputs)
            key = key_of({"inputs": inputs.facts, "evidence": asked.key, "recipe": own_recipe(job)})
            if (found := self._published(key, asked)) is not None:
                if self._litter():
                    with only_one(self._lock):
                        self._tidy()
                return found
            evidence.check(asked)
        self._check_outcome()
        with self._timed("export"):
            exported = artefact.export(job, store, inputs, progress)
        with self._timed("drift"):
            measured = evidence.measure(asked, store, exported.folder, progress)
        if not measured.passed:
            self._reject(measured)
            return self._result("stopped", measured, message="; ".join(measured.breaches))
        golden = None
        if job.recipe.file.release.golden:
            with self._timed("golden"):
                golden = evidence.golden(asked, store, exported.folder, progress)
        with self._timed("bundle"), only_one(self._lock):
            self._tidy()
            if (found := self._published(key, asked)) is not None:
                return found
            made = self._publish(Parts(exported, inputs, measured, golden, key))
        return self._result("built", measured, made)

    @property
    def _lock(self) -> Path:
        return self.job.out / LOCKS / f"{self.job.adapter.id}--{self.job.variant.name}"

    def _check_outcome(self) -> None:
        """Whether it can be published and signed: before the work, rather than after it."""
        make_folder(self.job.out)
        if not os.access(self.job.out, os.W_OK):
            raise OutputError(f"{self.job.out} can't be written; make it writable, or choose another -o")
        if (signer := self.job.recipe.signer) is not None:
            signing.check_signer(signer, self.job.recipe.trust)

    def _publish(self, parts: Parts) -> Manifest:
        with staged_folder(self.target, force=True) as stage:
            made = compose(self.job, stage, parts, self.store)
            if (signer := self.job.recipe.signer) is not None:
                signing.sign(stage, signer)
                # Else no later run would take it for what was asked, and each would make it again.
                signing.check(stage, self.job.recipe.trust)
        return made

    def _published(self, key: str, asked: evidence.Question) -> Result | None:
        """The bundle that is published already, when it is this very one, whole and signed as asked."""
        if self.job.fresh is not None:
            return None
        folder, recipe = self.target, self.job.recipe
        try:
            statement = read_json(folder / EVIDENCE / PROVENANCE, VeraEdgeError)
            if statement["predicate"]["buildDefinition"]["externalParameters"]["key"] != key:
                return None
            manifest = bundle.verify(folder, deep=False)
            if recipe.signer is not None and not (folder / bundle.SIGNATURE).is_file():
                return None
            signing.check(folder, recipe.trust)
            measured = evidence.read(folder / EVIDENCE, asked)
        except (VeraEdgeError, KeyError, TypeError):
            return None
        return self._result("unchanged", measured, manifest)

    def _reject(self, measured: Evidence) -> None:
        """Keep the evidence of a bundle that a gate stopped. One published before stays: it passed."""
        folder = self._rejected
        with only_one(self._lock):
            write_atomic(folder / evidence.REPORT, measured.report)
            write_atomic(folder / "breaches.json", canonical_json({"breaches": list(measured.breaches)}))

    @property
    def _rejected(self) -> Path:
        return self.job.out / "rejected" / self.job.name

    def _litter(self) -> bool:
        """Whether there is anything to `_tidy`."""
        return self._rejected.is_dir() or any(leftovers(self.target))

    def _tidy(self) -> None:
        """Remove what killed runs left here, and the evidence against an earlier try; under the lock."""
        try:
            sweep(self.target)
            if self._rejected.is_dir():
                shutil.rmtree(self._rejected)
        except OSError as cause:
            raise output_error(self.target, cause) from cause

    def _result(
        self, state: str, measured: Evidence, made: Manifest | None = None, message: str = ""
    ) -> Result:
        found = Result(self.job.name, state, message, kl=measured.kl, retained=measured.retained)
        return found if made is None else replace(found, digest=made.digest, size=made.size)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = time.perf_counter() - begun
