"""What connects the optimizers to PEFT, transformers and TRL."""
