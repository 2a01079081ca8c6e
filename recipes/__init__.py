"""Training scripts. Importing them silences what other packages say to nobody: their own deprecations, and files that need not exist.

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
# bitsandbytes, of a faster kernel for 4-bit models on CPUs with bfloat16 units.
OTHERS_LOG = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")

for _category, _beginning in OTHERS_WARNINGS:
    warnings.filterwarnings("ignore", message=_beginning, category=_category)
logging.getLogger(OTHERS_LOG[0]).addFilter(lambda record: not record.getMessage().startswith(OTHERS_LOG[1]))
