"""This module holds a few sentences to pre-train on."""

# 40 documents give neither a whole number of blocks nor of batches. A tokenizer of them has `VOCABULARY` tokens.
TEXTS = [f"Document {n} says that {n} and {n + 1} are {2 * n + 1}, and nothing else." for n in range(40)]
VOCABULARY = 300
