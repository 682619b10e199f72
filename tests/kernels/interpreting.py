"""Where tests of kernels run: on a GPU, or on a CPU under Triton's interpreter.

The interpreter must be chosen, by TRITON_INTERPRET=1, before triton is first imported; test_interpreted.py does.
"""

from __future__ import annotations

import dataclasses
import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
on_kernels = pytest.mark.parametrize("device", DEVICES)
on_cpu = pytest.mark.skipif(INTERPRETED, reason="no kernel is asked")

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # triton 3.6 with numpy 2.4 cannot loop to a bound that it computed (triton-lang/triton issue 9171)
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index

    # it replaces the language anew at each call of a function inside a kernel
    patch_language = interpreter._patch_lang

    def patch_language_once(function):
        modules = [one for one in function.__globals__.values() if one is tl or one is tl.core]
        unchanged = any(tl.core.is_builtin(module.arange) for module in modules)
        return patch_language(function) if unchanged else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_language_once

    # it checks all integers for overflow, which GPUs do not
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # it takes seconds for each of triton's own sorts; a test of test_drafting.py leaves that in place
    sort_of_triton = tl.topk

    def sorted_by_numpy(x, k):
        kept = np.sort(x.handle.data)[::-1][: getattr(k, "value", k)].copy()
        return tl.core.tensor(interpreter.TensorHandle(kept, x.handle.dtype), tl.block_type(x.dtype, list(kept.shape)))

    tl.topk = sorted_by_numpy
