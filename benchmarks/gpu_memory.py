"""`backdrop bench gpu`, memory: peaks of real training steps beside the estimate of `train/memory`."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

from .contenders import (
    backdrop_config,
    backdrop_processor,
)
from .gpu_run import GpuRun, NoDetector, free
from .planted_detector import PlantedDetector
from .shapes import SHAPES


@dataclass(frozen=True)
class StepCase:
    """One training step: what trains, and how long its rows are."""

    name: str
    trains: str
    rows: int
    length: int
    checkpointing: bool = True


def step_config(shape: str) -> BackdropConfig:
    """The configuration that the parts which time something have, but with a head of its own, as most models have."""
    llava = SHAPES[shape].llava_config()
    llava.text_config.tie_word_embeddings = llava.tie_word_embeddings = False
    return backdrop_config(llava)


def memory(run: GpuRun) -> None:
    """Peaks of real steps of `SFTTrainer` beside the estimate, for the device that this is."""
    small = run.shape == "tiny"
    shape, length = ("tiny", 100) if small else ("clip-l+135m", 1024)
    cases = [
        StepCase("LoRA", "LoRA", 4, length),
        StepCase("full", "full", 4, length),
        StepCase("full, no checkpointing", "full", 4, length, checkpointing=False),
    ]
    rows = run.results.setdefault("memory", {}).setdefault("rows", [])
    for case in cases:
        row: dict[str, Any] = {"shape": shape, "case": case.name}
        try:
            row |= step_memory(shape, case, run.device)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        run.write()
        free()


def step_memory(shape: str, case: StepCase, device: str) -> dict[str, int | None]:
    """Peak bytes of two steps of `SFTTrainer` in bfloat16 (`measured`; None on a CPU), and the estimate (`estimated`)."""
    # peft, trl and datasets are needed by this part alone.
    from datasets import Dataset
    from trl import ModelConfig, SFTConfig, SFTTrainer

    from backdrop.train.adapters import lora_config
    from backdrop.train.memory import estimate, meta_model
    from backdrop.train.memory.step import full_batch, split_evenly
    from backdrop.train.trainable import select_trainable

    on_gpu = torch.device(device).type == "cuda"
    config = step_config(shape)
    options = ModelConfig(
        dtype="bfloat16", attn_implementation="sdpa", use_peft=case.trains == "LoRA", lora_r=64
    )
    patterns, beside_lora = ["language_model", "lm_head", "multi_modal_projector"], ["multi_modal_projector"]
    examples = Dataset.from_list([{"messages": [{"role": "user", "content": ""}], "images": []}] * 8)
    processor = backdrop_processor(SHAPES[shape], PlantedDetector(NoDetector()))
    processor.chat_template = "{{ messages }}"
    with tempfile.TemporaryDirectory() as folder:
        training = SFTConfig(
            output_dir=folder,
            use_cpu=not on_gpu,
            bf16=True,
            per_device_train_batch_size=case.rows,
            gradient_checkpointing=case.checkpointing,
            optim="adamw_torch_fused",
            max_steps=2,
            max_length=None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = meta_model(config, options, patterns, beside_lora)
        estimated = estimate(
            model, training, options, sequence_length=case.length, device="cuda" if on_gpu else "cpu"
        ).allocated
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        config._attn_implementation = "sdpa"
        with torch.device(device):
            model = BackdropForConditionalGeneration(config).to(torch.bfloat16)
        if not options.use_peft:
            select_trainable(model, patterns)
        batch = full_batch(config, training, case.length, split_evenly(config, 1, 2))
        SFTTrainer(
            model=model,
            args=training,
            train_dataset=examples,
            processing_class=processor,
            data_collator=lambda _: dict(batch),
            peft_config=lora_config(model, options, beside_lora) if options.use_peft else None,
        ).train()
    measured = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return {"measured": measured, "estimated": estimated}
