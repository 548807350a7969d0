"""Answer a prompt with vLLM, its MoE layers on moe: python examples/serve_vllm.py Qwen/Qwen3-30B-A3B (a GPU, vllm 0.32 or 0.33).

A server takes the same variable: MOE_VLLM=1 vllm serve Qwen/Qwen3-30B-A3B
"""

import os
import sys


def main(model: str) -> None:
    os.environ["MOE_VLLM"] = "only"  # before vLLM is imported; 1 would leave layers that moe does not compute to vLLM
    from vllm import LLM, SamplingParams

    llm = LLM(
        model
    )  # the log says "moe_stages .. runs the experts of model.layers.0.mlp.experts, and of layers like it"
    for answer in llm.generate(["Experts are"], SamplingParams(max_tokens=32, temperature=0)):
        print(answer.outputs[0].text)


if __name__ == "__main__":
    main(sys.argv[1])
