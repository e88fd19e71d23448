"""The estimate compared with measured runs of `SFTTrainer` on the CPU.

python -m backdrop.train.memory.checks CASE ...   # measures the named cases; `check` starts this process
"""

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from trl import ModelConfig, SFTConfig, SFTTrainer

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import BackdropProcessor

from ..adapters import lora_config
from ..trainable import select_trainable
from .peak import estimate, meta_model
from .step import full_batch, split_evenly


@dataclass(frozen=True)
class CheckCase:
    """A small recipe that is both estimated and run."""

    name: str
    trains: str
    checkpointing: bool
    bf16: bool = False
    attention: str = "sdpa"
    optim: str = "adamw_torch_fused"
    # With a wide MLP the peak is in the recomputation of a layer; without it, in a tile of logits.
    wide: bool = False


CHECK_CASES = [
    *(
        CheckCase(
            f"{trains}, {'checkpointing' if checkpointing else 'no checkpointing'}", trains, checkpointing
        )
        for trains in ("full", "LoRA", "projector")
        for checkpointing in (False, True)
    ),
    CheckCase("full, bf16 autocast", "full", False, bf16=True),
    CheckCase("full, bf16 autocast, checkpointing", "full", True, bf16=True),
    CheckCase("LoRA, eager attention", "LoRA", False, attention="eager"),
    CheckCase("full, AdamW without fusion", "full", True, optim="adamw_torch"),
    CheckCase("LoRA, wide MLP, checkpointing", "LoRA", True, wide=True),
]
CHECK_ROWS, CHECK_LENGTH = 4, 400  # of a batch: examples, and tokens of each
CHECK_COLUMNS = ["case", "estimated MiB", "measured MiB", "error", "resident MiB"]


def check_config(case: CheckCase) -> BackdropConfig:
    """A small model whose activations still outweigh its weights: CLIP 4 x 256 at 224 px, Llama 6 x 384."""
    return BackdropConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=224,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=384,
            intermediate_size=24576 if case.wide else 1024,
            num_hidden_layers=2 if case.wide else 6,
            num_attention_heads=6,
            num_key_value_heads=3,
            vocab_size=8000,
        ),
        image_token_id=7990,
        separator_token_ids=[7991, 7992, 7993, 7994],
    )


def check_settings(case: CheckCase, folder: str) -> tuple[SFTConfig, ModelConfig, list[str]]:
    """TRL's options of a case, and the patterns of what trains."""
    training = SFTConfig(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=CHECK_ROWS,
        activation_checkpointing=case.checkpointing,
        bf16=case.bf16,
        optim=case.optim,
        max_steps=2,
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    options = ModelConfig(
        dtype="float32", attn_implementation=case.attention, use_peft=case.trains == "LoRA", lora_r=16
    )
    patterns = (
        ["language_model", "lm_head", "multi_modal_projector"] if case.trains == "full" else ["projector"]
    )
    return training, options, patterns


def measure(case: CheckCase) -> dict[str, int]:
    """Peak bytes of two real steps of `SFTTrainer` on the CPU.

    Returns:
        allocated: highest sum of what PyTorch's allocator handed out (torch.profiler's memory events).
        resident: growth of the process's peak resident memory (VmHWM), a second witness with malloc's noise.
    """
    config = check_config(case)
    config._attn_implementation = case.attention
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    BackdropProcessor.add_tokens(tokenizer)
    processor = BackdropProcessor(
        BackdropImageProcessor(patch_size=14), tokenizer, chat_template="{{ messages }}"
    )
    # The collator makes the batches; the trainer only counts these.
    examples = Dataset.from_list([{"messages": [{"role": "user", "content": ""}], "images": []}] * 8)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS (proc(5))
    before = _status_bytes("VmRSS")
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        training, options, patterns = check_settings(case, folder)
        model = BackdropForConditionalGeneration(config)
        if not options.use_peft:
            select_trainable(model, patterns)
        trainer = SFTTrainer(
            model=model,
            args=training,
            train_dataset=examples,
            processing_class=processor,
            data_collator=lambda _: full_batch(config, training, CHECK_LENGTH, split_evenly(config, 1, 2)),
            peft_config=lora_config(model, options, ["multi_modal_projector"]) if options.use_peft else None,
        )
        trainer.train()
        resident = _status_bytes("VmHWM") - before
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return {"allocated": peak, "resident": resident}


def _print_measured(case: CheckCase) -> None:
    print(json.dumps(measure(case)), flush=True)


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; wanted Linux.")
    return 1024 * int(found.group(1))


def check(cases: Iterable[CheckCase] = tuple(CHECK_CASES)) -> list[dict]:
    """Estimates each case here and measures it in another process, whose memory the estimates do not touch."""
    cases = list(cases)
    command = [sys.executable, "-m", "backdrop.train.memory.checks", *(case.name for case in cases)]
    comparisons = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        results = (json.loads(line) for line in run.stdout or () if line.startswith('{"allocated"'))
        for case, measured in zip(cases, results, strict=False):
            comparisons.append(_compared(case, measured))
            print(*check_cells(comparisons[-1]), sep="  ", file=sys.stderr, flush=True)
    if run.returncode or len(comparisons) < len(cases):
        raise RuntimeError(
            f"Of {len(cases)} measured runs {len(comparisons)} came to an end; see the messages above."
        )
    return comparisons


def check_cells(found: dict) -> list[str]:
    """One result of `check` as the cells of a table (`CHECK_COLUMNS`)."""
    sizes = [f"{found[name] / 2**20:.1f}" for name in ("estimated", "allocated")]
    return [found["case"], *sizes, f"{found['error']:+.1%}", f"{found['resident'] / 2**20:.0f}"]


def _compared(case: CheckCase, measured: dict[str, int]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        training, options, patterns = check_settings(case, folder)
        model = meta_model(check_config(case), options, patterns, ["multi_modal_projector"])
        estimated = estimate(model, training, options, sequence_length=CHECK_LENGTH, device="cpu").allocated
    error = estimated / measured["allocated"] - 1
    return {"case": case.name, "estimated": estimated, **measured, "error": error}


def main() -> None:
    """Measures the cases named on the command line, each in a process of its own."""
    for case in CHECK_CASES:
        if case.name in sys.argv[1:]:
            # In one process malloc would reuse unseen what it kept from the run before.
            child = multiprocessing.get_context("fork").Process(target=_print_measured, args=(case,))
            child.start()
            child.join()


if __name__ == "__main__":
    main()
