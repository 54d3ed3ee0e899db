"""One thread for torch: the tests' tensors are small, and idle threads spin on a busy machine.

No deadline for hypothesis: on such a machine a slow example is no defect.
"""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
