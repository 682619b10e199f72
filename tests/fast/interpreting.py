"""Where tests of kernels run: on a GPU, or on a CPU under Triton's interpreter.

The interpreter must be chosen, by TRITON_INTERPRET=1, before triton is first imported; test_interpreted.py does.
"""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
on_kernels = pytest.mark.parametrize("device", DEVICES)
on_cpu = pytest.mark.skipif(INTERPRETED, reason="no kernel is asked")

if INTERPRETED:  # triton 3.6 with numpy 2.4 cannot loop to a bound that it computed (triton-lang/triton issue 9171)
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
