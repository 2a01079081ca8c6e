"""This package holds low-rank moments and the rules by which they follow gradients. It knows tensors, no optimizer."""
