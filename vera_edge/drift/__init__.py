"""Drift: how far an artefact is from the model as it was trained, measured, bounded and shown.

    windows     text -> token windows
    metrics     two models' logits of a window -> one figure per token (numpy only)
    aggregate   figures of any number of windows -> a Comparison, in bounded memory
    bootstrap   confidence intervals, by resampling windows
    evaluate    reference, artefact, base and noise floor, window by window -> DriftReport
    limits      DriftReport -> what broke, what can't be decided
    layers      weight error by layer, and which layer causes the drift
    report      DriftReport -> one HTML file;  plots: the same as PNG;  junit: for pipelines

Two figures always stand together: *fidelity*, from the reference to the artefact, and *effect*, from the
reference to the base without the adapter. An artefact whose fidelity isn't far below the effect has lost
its adapter, however small the figure looks by itself.
"""
