"""This package reruns the paper's comparison, and others, in one command: `python -m eval.rerun SUITE`."""
