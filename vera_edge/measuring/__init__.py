"""Drift: how far an artefact is from the model as it was trained, measured, bounded and shown.

    windows        text -> token windows, the same for both models
    metrics        two models' logits of a window -> one figure per token (numpy only)
    comparison     what was found over a text, as data;  bootstrap: its confidence intervals
    aggregate      figures of any number of windows -> a Comparison, in bounded memory
    opened_reference, opened_candidate
                   the model as trained and the artefact, whatever shape they have
    evaluate       runs reference, artefact, base and noise floor over the windows;  verdict: what it means
    layers         weight error by layer, and which layer causes the drift
    continuations  the same prompts continued by both
    encoders       the same for embeddings and classes (encoder_assess, encoder_report)
    assess         all of it as one call -> DriftReport (result)
    limits         what is broken, what can't be decided;  baseline: held to an earlier report
    outputs        the files: html (charts, svg), junit, plots;  llama_cpp: the figures under its names

Two figures always stand together: *fidelity*, from the reference to the artefact, and *effect*, from the
reference to the base without the adapter. An artefact whose fidelity isn't far below the effect has lost
its adapter, however small the figure looks by itself.
"""
