"""Silences messages that other libraries log on import and that no user can act on. Recipes import it first."""

import logging


UNUSED_KERNELS = "Failed to load CPU gemm_4bit_forward"  # bitsandbytes, wherever the package `kernels` is missing
NO_ACCELERATOR = "Setting accelerator to CPU"  # DeepSpeed, although --use_cpu already asks for the CPU

for name, message in (("bitsandbytes.backends.cpu.ops", UNUSED_KERNELS), ("DeepSpeed", NO_ACCELERATOR)):
    logging.getLogger(name).addFilter(lambda record, message=message: message not in record.getMessage())
