"""One vLLM engine in a process of its own: reads a job from stdin, writes the results to the file that it names.

A job is JSON: `engine`, the arguments of `LLM`; `batches`, each with `prompts` (token ids), `params` (arguments of
`SamplingParams`, one for all or one for each prompt) and perhaps `lora`, an adapter's folder; `output`, a file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def sampling_params(fields: dict):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if (form := fields.pop("structured", None)) is not None:
        fields["structured_outputs"] = StructuredOutputsParams(**form)
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    return SamplingParams(**fields)


def run(llm, batch: dict) -> list[dict]:
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in batch["prompts"]]
    params = batch["params"]
    params = [sampling_params(dict(one)) for one in (params if isinstance(params, list) else [params] * len(prompts))]
    lora = LoRARequest("adapter", 1, batch["lora"]) if batch.get("lora") else None
    answers = []
    for answer in llm.generate(prompts, params, lora_request=lora, use_tqdm=False):
        for one in answer.outputs:
            logprobs = one.logprobs and [
                {str(token): entry.logprob for token, entry in position.items()} for position in one.logprobs
            ]
            fields = {"tokens": list(one.token_ids), "text": one.text, "logprobs": logprobs}
            answers.append(fields | {"reason": one.finish_reason, "cached": answer.num_cached_tokens})
    return answers


def counters(llm) -> dict:
    """The engine's counters, with the part of the name behind the colon."""
    found = {}
    for one in llm.get_metrics():
        value = getattr(one, "value", getattr(one, "values", None))
        if value is not None:
            found[one.name.partition(":")[2]] = value
    return found


def main() -> None:
    from vllm import LLM

    job = json.load(sys.stdin)
    llm = LLM(**job["engine"])
    results, metrics = [], []
    for batch in job["batches"]:
        results.append(run(llm, batch))
        metrics.append(counters(llm))
    Path(job["output"]).write_text(json.dumps({"results": results, "metrics": metrics}))


if __name__ == "__main__":
    main()
