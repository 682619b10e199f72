"""A plug-in for vLLM that drafts with recurrent drafters: method `redrafter` in its speculative config.

    vllm serve MODEL --speculative-config '{"method": "redrafter", "model": "my-drafter", "num_speculative_tokens": 4}'

vLLM calls `register` in all of its processes (https://docs.vllm.ai/en/latest/design/plugin_system.html).  Guarantees
that engines with another method, or without one, are unaffected.  vLLM verifies the drafts with its own scheduler,
kernels and KV cache.  Modules of this package import vllm; only this one and `settings` can be imported without it.
"""

from __future__ import annotations


def register() -> None:
    """Makes vLLM accept method `redrafter`.  May be called several times in a process."""
    from redrafter.integrations.vllm import frontend

    frontend.install()
