"""Cold encoding of split images against the stock tower on whole ones: paired, alternating, one process.

    backdrop bench encode --pairs 5

Shape: CLIP-L/14-336, random weights, feature layer -2. The stock tower computes all its layers, as LLaVA lets it;
the ratio is also given against a tower cut at the feature layer, so that skipping a layer does not flatter us.
"""

import time
from statistics import median

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from backdrop.modeling.grouped_vision_backdrop import encode_groups


def run_encode(pairs: int = 5, images: int = 1, object_patches: int = 86, threads: int = 2) -> dict:
    """Ratios of the split encoding's time to each stock tower's: medians over the pairs.

    Args:
        pairs: timed runs of each way, in turns.
        images: in one call.
        object_patches: of 576 in each image.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    tower = CLIPVisionModel(config).eval()
    pixels = torch.randn(images, 3, 336, 336)
    objects = torch.zeros(images, 576, dtype=torch.bool)
    objects[:, :object_patches] = True
    groups = pixels.repeat(2, 1, 1, 1)
    masks = torch.cat([~objects, objects])
    whole = torch.ones(images, 576, dtype=torch.bool)
    ways = {
        "stock tower": lambda: tower(pixels, output_hidden_states=True),
        "stock, cut": lambda: encode_groups(tower, pixels, whole, -2),
        "split": lambda: encode_groups(tower, groups, masks, -2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for run in range(pairs + 1):  # the first is warm-up
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                if run:
                    seconds[name].append(time.perf_counter() - started)
    ratios = {
        f"split / {name}": median(s / t for s, t in zip(seconds["split"], seconds[name], strict=True))
        for name in ("stock tower", "stock, cut")
    }
    return {"images": images, "pairs": pairs, **{k: round(v, 3) for k, v in ratios.items()}}
