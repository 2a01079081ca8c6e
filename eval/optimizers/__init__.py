"""This package holds optimizers that no published package implements as their papers define them."""
