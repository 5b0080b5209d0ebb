"""How many requests are let in, and what the others are told."""

from __future__ import annotations

import pytest

from vera_edge.serving.admission import Admission
from vera_edge.serving.refusal import RefusedRequestError


def test_one_more_than_there_is_room_for_is_told_to_come_again() -> None:
    admission = Admission(2)
    first, second = admission.enter(), admission.enter()
    with pytest.raises(RefusedRequestError) as refused:
        admission.enter()
    assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "1"
    first.leave()
    first.leave()  # once is enough
    assert admission.inside == 1
    admission.enter()
    with pytest.raises(RefusedRequestError):
        admission.enter()
    second.leave()
    assert admission.inside == 1
