"""Tiny object detectors of transformers with random weights, written as checkpoints are."""

from pathlib import Path

import torch
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

LABELS = {0: "person", 1: "bus", 2: "dog"}


def _detr(config_class, model_class, **more):
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return model_class(
        config_class(
            backbone_config=backbone,
            encoder_in_channels=[8, 8, 8],
            encoder_hidden_dim=16,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_in_channels=[16, 16, 16],
            d_model=16,
            decoder_ffn_dim=16,
            decoder_attention_heads=2,
            decoder_layers=2,
            num_queries=12,
            hidden_expansion=0.5,
            **more,
        )
    )


MODELS = {
    "rt_detr": lambda: _detr(RTDetrConfig, RTDetrForObjectDetection),
    "rt_detr_v2": lambda: _detr(RTDetrV2Config, RTDetrV2ForObjectDetection),
    "d_fine": lambda: _detr(DFineConfig, DFineForObjectDetection),
    "yolos": lambda: YolosForObjectDetection(
        YolosConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=[64, 64],
            num_detection_tokens=10,
        )
    ),
}


def write_detector(folder: Path, family: str):
    """Writes a checkpoint; its model and its image processor."""
    torch.manual_seed(0)
    model = MODELS[family]()
    model.config.id2label = dict(LABELS)
    model.config.label2id = {name: i for i, name in LABELS.items()}
    if family == "yolos":
        model = YolosForObjectDetection(model.config)
        processor = YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    else:
        model = type(model)(model.config)
        processor = RTDetrImageProcessorPil(size={"height": 96, "width": 96})
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
