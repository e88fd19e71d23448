"""Cold encoding of split images against the stock tower on whole ones: paired, alternating, one process.

    python benchmarks/encode.py --pairs 5

Shape: CLIP-L/14-336, random weights, feature layer -2. The stock tower computes all its layers, as LLaVA lets it;
the ratio is also given against a tower cut at the feature layer, so that skipping a layer does not flatter us.
"""

import argparse
import json
import time
from statistics import median

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from backdrop.modeling.grouped_vision_backdrop import encode_groups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--object-patches", type=int, default=86, help="of 576")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    tower = CLIPVisionModel(config).eval()
    images = torch.randn(options.images, 3, 336, 336)
    objects = torch.zeros(options.images, 576, dtype=torch.bool)
    objects[:, : options.object_patches] = True
    groups = images.repeat(2, 1, 1, 1)
    masks = torch.cat([~objects, objects])
    whole = torch.ones(options.images, 576, dtype=torch.bool)
    ways = {
        "stock tower": lambda: tower(images, output_hidden_states=True),
        "stock, cut": lambda: encode_groups(tower, images, whole, -2),
        "split": lambda: encode_groups(tower, groups, masks, -2),
    }
    seconds = {name: [] for name in ways}
    with torch.no_grad():
        for run in range(options.pairs + 1):  # the first is warm-up
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                if run:
                    seconds[name].append(time.perf_counter() - started)
    ratios = {
        f"split / {name}": median(s / t for s, t in zip(seconds["split"], seconds[name], strict=True))
        for name in ("stock tower", "stock, cut")
    }
    print(
        json.dumps(
            {"images": options.images, "pairs": options.pairs, **{k: round(v, 3) for k, v in ratios.items()}}
        )
    )


if __name__ == "__main__":
    main()
