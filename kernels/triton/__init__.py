"""The kernels in Triton, one file a family. Importing this package imports Triton, and registers
them under the names, and with the signatures, of their definitions.

float16, bfloat16 and float32, also mixed; float64 is left to the definition. Products are formed
in the inputs' type if they agree, else in float32, and in float32 they are exact to its last bits
unless torch.backends.cuda.matmul requests tf32. Sums are kept and returned in float32.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
