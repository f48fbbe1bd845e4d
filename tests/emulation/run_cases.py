"""run_cases.py LIBRARY NAME...: launches cases of faults.cpp, each announced on stderr, on zeros of just their size."""

import ctypes
import os
import sys

import torch

library = ctypes.CDLL(sys.argv[1])
library.fastconv_emulation_run_case.restype = ctypes.c_char_p
for name in sys.argv[2:]:
    os.write(2, f"case {name}\n".encode())
    out = torch.zeros(6 * 64 if name.startswith("ordered") else 64)
    for _ in range(2):  # the second launch comes after the first
        error = library.fastconv_emulation_run_case(name.encode(), ctypes.c_void_p(out.data_ptr()))
    assert error is None, error
