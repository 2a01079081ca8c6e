"""The paper's comparison, and others, rerun in one command: `python -m eval.rerun SUITE`."""
