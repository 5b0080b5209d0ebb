"""Refitted vectors against scipy's least squares on the outputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from vera_edge.adapters import projection
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.requantize import Gram, output_error
from vera_edge.rounding import recover

OUT, IN, RANK, TOKENS = 20, 48, 12, 600
Case = tuple[LambdaVectors, np.ndarray, projection.Projections, np.ndarray]


@pytest.fixture(scope="module")
def case() -> Case:
    """Vectors, what is left for the branch, projections, and inputs with correlated columns."""
    rng = np.random.default_rng(7)
    spec = projection.ProjectionSpec(rank=RANK, in_max=IN, out_max=OUT, seed=3)
    projections = projection.regenerate(spec)
    vectors = LambdaVectors(
        rng.standard_normal(OUT).astype(np.float32), rng.uniform(0.5, 1.5, RANK).astype(np.float32)
    )
    delta = projections.delta(vectors.lambda_b, vectors.lambda_d, IN)
    left = delta + 0.05 * np.abs(delta).mean() * rng.standard_normal((OUT, IN)).astype(np.float32)
    x = rng.standard_normal((TOKENS, IN)) @ rng.standard_normal((IN, IN)) / IN**0.5
    return vectors, left, projections, x.astype(np.float32)


def error(left: np.ndarray, vectors: LambdaVectors, projections: projection.Projections, gram: Gram) -> float:
    return output_error(left, projections.delta(vectors.lambda_b, vectors.lambda_d, IN), gram)


def test_lambda_b_is_least_squares_on_the_outputs(case: Case) -> None:
    vectors, left, projections, x = case
    gram = Gram.of(x.T @ x, damp=1e-6)
    found = recover.refit(vectors, left, projections, gram, ["lambda_b"])
    rows = projections.delta(np.ones(OUT, np.float32), vectors.lambda_d, IN)
    for row in range(OUT):
        best = lsq_linear((x @ rows[row])[:, None], x @ left[row]).x[0]
        assert abs(found.lambda_b[row] - best) < 0.03 * abs(best) + 0.02, (
            "but for the pull to what was trained"
        )
    assert (found.lambda_d == vectors.lambda_d).all()


def test_lambda_d_is_least_squares_on_the_outputs(case: Case) -> None:
    vectors, left, projections, x = case
    gram = Gram.of(x.T @ x, damp=1e-6)
    found = recover.refit(vectors, left, projections, gram, ["lambda_d"])
    scaled = vectors.lambda_b[:, None] * projections.b[:OUT]
    columns = [np.outer(x @ projections.a[k, :IN], scaled[:, k]).reshape(-1) for k in range(RANK)]
    best = lsq_linear(np.stack(columns, axis=1), (x @ left.T).reshape(-1)).x
    np.testing.assert_allclose(found.lambda_d, best, atol=0.02 * np.abs(best).max())
    assert (found.lambda_b == vectors.lambda_b).all()


def test_each_part_lowers_the_error_and_both_lower_it_most(case: Case) -> None:
    vectors, left, projections, x = case
    gram = Gram.of(x.T @ x)
    trained = error(left, vectors, projections, gram)
    alone = [
        error(left, recover.refit(vectors, left, projections, gram, [part]), projections, gram)
        for part in recover.VECTORS
    ]
    both = error(left, recover.refit(vectors, left, projections, gram), projections, gram)
    assert both < min(alone) and max(alone) < trained


def test_a_perfect_base_leaves_the_vectors_alone(case: Case) -> None:
    vectors, _, projections, x = case
    left = projections.delta(vectors.lambda_b, vectors.lambda_d, IN)
    found = recover.refit(vectors, left, projections, Gram.of(x.T @ x))
    np.testing.assert_allclose(found.lambda_b, vectors.lambda_b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.lambda_d, vectors.lambda_d, rtol=1e-4, atol=1e-5)
