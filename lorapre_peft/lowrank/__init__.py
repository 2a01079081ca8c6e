"""Low-rank moments and the rules by which they follow gradients: tensors only, no optimizer."""
