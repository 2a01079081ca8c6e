"""Training scripts. Importing them silences what other packages say to nobody, such as their own deprecations.

Here, because one of them speaks while it is imported.
"""

import logging
import warnings

# Warnings that are silenced, by category and the beginning of their text.
OTHERS_WARNINGS = (
    # TRL and PEFT still use transformers' former names, and TRL gives the first of them a value of its own.
    (FutureWarning, "`gradient_checkpointing` is deprecated"),
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
    # PEFT says this of a model that is no folder with a config.json: smollm2 is one GGUF file.
    (UserWarning, "Could not find a config file in "),
)
# Log messages that are silenced, by logger and the beginning of their text.
OTHERS_LOGS = (
    # bitsandbytes misses a faster kernel for 4-bit models on CPUs with bfloat16 units.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    # datasets does not save a shuffle buffer's content; `recipes.corpus` has a buffer of a single document.
    ("datasets.iterable_dataset", "Loading a state dict of a shuffle buffer"),
)

for _category, _beginning in OTHERS_WARNINGS:
    warnings.filterwarnings("ignore", message=_beginning, category=_category)
for _logger, _beginning in OTHERS_LOGS:
    logging.getLogger(_logger).addFilter(lambda record, text=_beginning: not record.getMessage().startswith(text))
