"""One thread for torch in every test: the models are tiny, and two threads on busy cores are many
times slower than one.
"""

import torch

torch.set_num_threads(1)
