"""This package connects the optimizers to PEFT, transformers, TRL, axolotl and LLaMA-Factory."""
