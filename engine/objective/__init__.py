"""What is minimised: the losses, the reference that they measure from, scoring.

`losses.LOSSES`, `references.Reference` and `scoring.score_completions` are what
training takes of it.
"""
