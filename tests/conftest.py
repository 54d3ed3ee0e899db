"""One thread for torch: the tests' tensors are small, and idle threads spin on a busy machine."""

import torch

torch.set_num_threads(1)
