"""An adapter and its base read as the one model that was trained.

Comes in: a base and adapters. Gives: both with one set of names, the class, head and vocabulary that
were trained, and the projections that were trained with; or one sentence that says why they don't belong
together.
"""
