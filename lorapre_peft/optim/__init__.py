"""This package holds the optimizers `LoRAPreAdamW` and `LoRAPreMuon`."""
