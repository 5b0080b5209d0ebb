"""Results as JUnit XML, which pipelines show as tests."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.result import DriftReport

State = Literal["passed", "failure", "error"]


@dataclass(frozen=True)
class TestCase:
    """One line of a pipeline's list. kind: of a failure, for tools that group by it."""

    name: str
    state: State
    message: str = ""
    kind: str = ""


def document(tool: str, suite: str, classname: str, cases: Sequence[TestCase]) -> bytes:
    """One suite of cases as UTF-8 XML."""
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.state == "failure" for case in cases)),
        "errors": str(sum(case.state == "error" for case in cases)),
        "skipped": "0",
    }
    root = ET.Element("testsuites", {"name": tool} | counts)
    parent = ET.SubElement(root, "testsuite", {"name": suite} | counts)
    for case in cases:
        element = ET.SubElement(parent, "testcase", classname=classname, name=case.name)
        if case.state != "passed":
            kind = {"type": case.kind} if case.kind else {}
            ET.SubElement(element, case.state, kind | {"message": case.message})
        elif case.message:
            ET.SubElement(element, "system-out").text = case.message
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def render(report: DriftReport | EncoderReport) -> bytes:
    """One test case per limit; broken and undecided ones are failures of that type."""
    # Without limits there is still something a pipeline can see: that drift was measured.
    cases = [TestCase("measured", "passed", report.verdict.sentence)]
    for outcome in report.outcomes:
        state: State = "passed" if outcome.state == "kept" else "failure"
        cases.append(TestCase(outcome.limit, state, outcome.sentence, outcome.state))
    return document("vera-edge drift", report.candidate.name, "vera_edge.drift", cases)
