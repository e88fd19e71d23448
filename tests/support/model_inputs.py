"""Inputs for tiny models, and what many tests of the model do with them."""

import tiny
import torch


def batch(model, rows=((0, 1), (2, 3)), groups=4, seed=0, separators=True, **kwargs):
    """Inputs of left-padded rows with their own groups each."""
    pixels, mask, kind = tiny.random_groups(groups, seed)
    ids, attention = tiny.pad_left(tiny.prompt_ids(rows, mask, kind, separators, **kwargs))
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "pixel_values": pixels,
        "patch_mask": mask,
        "group_kind": kind,
    }


def inputs_of(layout, seed: int = 0, texts=None, kinds=None) -> dict:
    """Rows of group indices -> model inputs, padded on the left; group g is background where `kinds[g]` is 0."""
    groups = max([g for row in layout for g in row], default=-1) + 1
    pixels, mask, kind = tiny.random_groups(max(groups, 1), seed=seed)
    if kinds is not None:
        kind = torch.tensor(kinds)
    rows = tiny.prompt_ids(layout, mask, kind)
    for row, text in zip(rows, texts or [()] * len(rows), strict=True):
        row.extend(text)
    ids, attention = tiny.pad_left(rows)
    inputs = {"input_ids": ids, "attention_mask": attention}
    return inputs | ({"pixel_values": pixels, "patch_mask": mask, "group_kind": kind} if groups else {})


def row_of(inputs, r, groups):
    """Row `r` of a batch alone, without its padding."""
    start = int(inputs["attention_mask"][r].argmax())
    visual = {name: inputs[name][list(groups)] for name in ("pixel_values", "patch_mask", "group_kind")}
    text = {name: inputs[name][r : r + 1, start:] for name in ("input_ids", "attention_mask")}
    return {**text, **visual}


def positions(attention_mask):
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def trained_prefusion(model):
    """Prefusion that does something."""
    with torch.no_grad():
        for parameter in model.model.prefusion.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def generate(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)


def misses(model):
    stats = model.background_cache.stats()
    return stats["tokens_misses"], stats["prefix_misses"]
