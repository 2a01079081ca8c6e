"""Training scripts. Importing them silences what other packages say to nobody: their own deprecations, and files that
need not exist.

Here, because one of them speaks while it is imported.
"""

import logging
import warnings

# By category and the beginning of the text.
OTHERS_WARNINGS = (
    # TRL and PEFT still use transformers' former names, and TRL gives the first of them a value of its own.
    (FutureWarning, "`gradient_checkpointing` is deprecated"),
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
    # PEFT, of a model that is no folder with a config.json: smollm2 is one GGUF file.
    (UserWarning, "Could not find a config file in "),
)
# By logger and the beginning of the text.
OTHERS_LOGS = (
    # bitsandbytes, of a faster kernel for 4-bit models on CPUs with bfloat16 units.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    # datasets, of a shuffle buffer whose content is not in the state; `recipes.corpus` has one of a single document.
    ("datasets.iterable_dataset", "Loading a state dict of a shuffle buffer"),
)

for _category, _beginning in OTHERS_WARNINGS:
    warnings.filterwarnings("ignore", message=_beginning, category=_category)
for _logger, _beginning in OTHERS_LOGS:
    logging.getLogger(_logger).addFilter(lambda record, text=_beginning: not record.getMessage().startswith(text))
