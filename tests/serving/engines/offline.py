"""Run by the engine's Python: `LLM(...)` on a folder, prompts and images from a file, tokens to another.

python offline.py FOLDER requests.npz answers.json
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
from vllm import LLM, SamplingParams


def main(folder: str, requests: str, answers: str) -> None:
    data = np.load(requests)
    asked = json.loads(str(data["requests"]))
    engine = LLM(
        folder,
        trust_remote_code=True,
        model_impl="transformers",
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        enforce_eager=True,
        block_size=32,
        kv_cache_memory_bytes=2**28,
        limit_mm_per_prompt={"image": 4},
        seed=0,
    )
    found = []
    for request in asked:
        prompt = {
            "prompt": request["prompt"],
            "multi_modal_data": {"image": [data[name] for name in request["images"]]},
            "multi_modal_uuids": {"image": request["uuids"]},
        }
        greedy = SamplingParams(temperature=0, max_tokens=12)
        answer = engine.generate(prompt, greedy, use_tqdm=False)[0]
        found.append({"tokens": list(answer.outputs[0].token_ids), "cached": answer.num_cached_tokens})
    with open(answers, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
