"""Answer a prompt with SGLang, its MoE layers on moe: python examples/serve_sglang.py Qwen/Qwen3-30B-A3B (a GPU, sglang 0.5.21 to 0.5.23).

A server takes the same name: python -m sglang.launch_server --moe-runner-backend moe_stages --model-path Qwen/Qwen3-30B-A3B
"""

import sys


def main(model: str) -> None:
    import sglang

    engine = sglang.Engine(model_path=model, moe_runner_backend="moe_stages")
    answer = engine.generate("Experts are", {"max_new_tokens": 32, "temperature": 0})
    print(answer["text"])
    engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
