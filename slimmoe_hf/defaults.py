"""What is done unless somebody says otherwise, where more than one place asks for it. Imports nothing, for `--help`."""

RECONSTRUCT = False
"""Whether a cut is followed by `reconstruction.reconstruct`: on the command line, in recipes, and in the callback."""


def reconstructs(asked: bool | None) -> bool:
    """What somebody asked for, or the default where nobody did."""
    return RECONSTRUCT if asked is None else asked
