"""Marks of tests that run in this process, which takes a GPU wherever there is one."""

import pytest
import torch

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a run on a CPU")
