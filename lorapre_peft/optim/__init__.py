"""The optimizers `LoRAPreAdamW` and `LoRAPreMuon`."""
