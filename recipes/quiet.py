"""Imported first by a recipe: silences what other libraries say when they are imported, and no user can act on."""

import logging


UNUSED_KERNELS = "Failed to load CPU gemm_4bit_forward"  # bitsandbytes, wherever the package `kernels` is missing
NO_ACCELERATOR = "Setting accelerator to CPU"  # DeepSpeed, which is told by --use_cpu already

for name, message in (("bitsandbytes.backends.cpu.ops", UNUSED_KERNELS), ("DeepSpeed", NO_ACCELERATOR)):
    logging.getLogger(name).addFilter(lambda record, message=message: message not in record.getMessage())
