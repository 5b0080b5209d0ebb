"""The limits of a report as JUnit XML, which pipelines show as tests."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from vera_edge.measuring.encoder_report import EncoderReport
from vera_edge.measuring.result import DriftReport


def render(report: DriftReport | EncoderReport) -> bytes:
    """One test case per limit; broken and undecided ones are failures of that type. UTF-8 XML."""
    failed = sum(outcome.state != "kept" for outcome in report.outcomes)
    counts: dict[str, str] = {
        "tests": str(len(report.outcomes) + 1),
        "failures": str(failed),
        "errors": "0",
        "skipped": "0",
    }
    suites = ET.Element("testsuites", {"name": "vera-edge drift"} | counts)
    suite = ET.SubElement(suites, "testsuite", {"name": report.candidate.name} | counts)
    # Without limits there is still something a pipeline can see: that drift was measured.
    measured = ET.SubElement(suite, "testcase", classname="vera_edge.drift", name="measured")
    ET.SubElement(measured, "system-out").text = report.verdict.sentence
    for outcome in report.outcomes:
        case = ET.SubElement(suite, "testcase", classname="vera_edge.drift", name=outcome.limit)
        if outcome.state == "kept":
            ET.SubElement(case, "system-out").text = outcome.sentence
        else:
            ET.SubElement(case, "failure", type=outcome.state, message=outcome.sentence)
    ET.indent(suites)
    return ET.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"
