"""The torch devices that tests run on: the CPU, and CUDA where there is one."""

from __future__ import annotations

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if HAS_CUDA:
    torch.zeros(1, device="cuda")  # what a driver opens stays open: no single test has leaked it

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device"))
