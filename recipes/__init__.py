"""This package holds the training scripts. Importing it silences some warnings of other packages.

No user can act on these warnings, such as those of deprecations inside the packages. They are silenced here because
one of the packages warns while it is imported.
"""

import logging
import warnings

# These warnings are silenced. Each entry is a category and the beginning of the text.
OTHERS_WARNINGS = (
    # TRL and PEFT still use transformers' former names, and TRL gives the first of them a value of its own.
    (FutureWarning, "`gradient_checkpointing` is deprecated"),
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
    # PEFT warns of a model that is not a folder with a config.json. The model smollm2 is one GGUF file.
    (UserWarning, "Could not find a config file in "),
)
# These log messages are silenced. Each entry is a logger and the beginning of the text.
OTHERS_LOGS = (
    # bitsandbytes misses a faster kernel for 4-bit models on CPUs with bfloat16 units.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    # datasets does not save the content of a shuffle buffer. The buffer of `recipes.corpus` has a single document.
    ("datasets.iterable_dataset", "Loading a state dict of a shuffle buffer"),
)

for _category, _beginning in OTHERS_WARNINGS:
    warnings.filterwarnings("ignore", message=_beginning, category=_category)
for _logger, _beginning in OTHERS_LOGS:
    logging.getLogger(_logger).addFilter(lambda record, text=_beginning: not record.getMessage().startswith(text))
