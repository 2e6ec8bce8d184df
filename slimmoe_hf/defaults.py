"""What is done unless somebody says otherwise, where more than one place asks for it. Imports nothing, for `--help`."""

RECONSTRUCT = False
"""Whether a cut is followed by `reconstruction.reconstruct`: on the command line, in recipes, comparisons and the callback."""
