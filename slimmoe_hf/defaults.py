"""What is done unless somebody says otherwise, where more than one place asks for it. Imports nothing, for `--help`."""

CRITERION = "energy"
"""What chooses neurons and groups: with reconstruction ahead of the others, or level, right after every cut that was measured
(README.md, "Which cut"); it looks at no gradient."""

EXPERT_CRITERION = "reap"
"""What chooses experts where neither its own criterion is named nor that of neurons scores experts."""

CALIBRATION_LOSS = "kd_topk"
"""What is differentiated where gradients are looked at (the paper's)."""

NO_LOSS = "none"
"""The calibration loss of a sweep without any: one forward pass, for criteria that look at no gradient."""

RECONSTRUCT = True
"""Whether a cut is followed by `reconstruction.reconstruct`: on the command line, in recipes, and in the callback."""


def reconstructs(asked: bool | None) -> bool:
    """What somebody asked for, or the default where nobody did."""
    return RECONSTRUCT if asked is None else asked
