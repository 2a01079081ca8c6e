"""Optimizers of the comparisons that no published package has as its paper has them: one short class each."""
