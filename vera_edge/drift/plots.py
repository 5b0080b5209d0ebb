from vera_edge.drift.result import DriftReport


def render(report: DriftReport) -> dict[str, bytes]:
    return {}
