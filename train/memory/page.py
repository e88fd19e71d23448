"""The text of memory.md, with places for the tables."""

PAGE = """\
# Memory of a training run, before it starts

Written by `backdrop bench memory --docs docs`; numbers in `memory.json`.

`backdrop.train.memory.estimate` runs one whole training step on tensors without data and counts the storages alive:
batch, towers, projector, prefusion, language model, TRL's chunked loss, backward with recomputation, clipping, optimizer.
Nothing is guessed by formula except what the last section lists.

## LLaVA-1.5-7B

CLIP-L/14 at 336 px and Llama-2-7B; images split into two groups; 576 image tokens and 200 or 1,472 text tokens (2,048 in
all, LLaVA's maximum); every token supervised; gradient checkpointing; fused AdamW; the projector and the separators' rows
train beside LoRA (r = 128 on all linear maps of the language model's layers, LLaVA's recipe). GiB at the moment of the
peak; a part that does not exist at that moment is 0.

{llava}

What to read from it:
- Rows of one batch that differ in length need a mask, and with a mask PyTorch takes memory-efficient attention, which keeps
  a bias per layer; a single row needs none and runs on flash attention.
- peft keeps LoRA's weights in float32 over a bfloat16 model and copies the input of every adapted map to float32
  (`_cast_input_dtype`); over a quantised model TRL casts them to bfloat16. At 16 rows the recomputation of one layer costs
  more than the whole quantised model.
- bitsandbytes' LLM.int8() keeps the input of every linear map on the function's context, where checkpointing cannot free it
  (seen with bitsandbytes 0.50.2 on the CPU, too): for training prefer 4 bits.
- TRL's loss never holds the logits of all tokens, only a tile of 4,096 x 32,768 at most.

### Published figures

- LLaVA's author (haotian-liu/LLaVA issue 842): LoRA training of the 7B model fits 8 RTX 3090 of 24 GB, with fewer rows a
  device than the script's 16. That is with the weights divided (ZeRO-3); the table says that one row fits without.
- LLaVA's README (quoted in issue 528): full finetuning of the 7B model with `finetune.sh`, ZeRO-3 and 16 rows a device, on 8
  A100 of 40 GB: the last row of the table.
- LLaVA issues 569 and 655: full finetuning with ZeRO-2 and one row runs out of memory on 4 A100 of 40 GB, as in the table;
  with 8 the author says that it "should work fine", as the table does, and one user of two nodes reports that it did not
  (DeepSpeed's communication buffers are not in the estimate).
- LLaVA issue 697: QLoRA of the 13B model with 16 rows and offloading runs out of memory on one A100; a commenter advises 8
  rows for 40 GB. The 7B model at 8 rows must be, and is, below that.
- InternLM/xtuner issue 526 gives 48 GB as the minimum for LLaVA-7B in its recipes, which do not set the same batch.

## Checked against measured runs

Two real steps of `SFTTrainer` on the CPU, {rows} rows of {length} tokens with an image each; measured is the highest sum
that PyTorch's allocator handed out (memory events of torch.profiler). Largest error: {worst}.
"Resident" is the growth of the process's peak resident memory, which has malloc's rounding, thread buffers and oneDNN's
scratch memory in it: a second witness, not the same quantity.

{check}

The same code with CUDA's kernels put in makes the table above; it has not been compared with a run on a GPU.

## What is assumed

- A card offers less than its name says ({cards}), and the table leaves {margin} of the estimate free: for what runs took beyond
  it, and for a display or other programs.
- CUDA context and libraries take {context}; the caching allocator cannot hand out {fragmentation} of what it holds. Both are
  usual values, not measured here. `overhead` is their sum.
- Attention on a GPU: flash in half precision without a mask, memory-efficient otherwise (PyTorch's own choice); its backward
  takes a float32 copy of the queries as workspace. "flash_attention_2" and other kernels from outside PyTorch are not run:
  estimate with "sdpa" and one row, which keeps the same tensors.
- bitsandbytes' layers and optimizers are stood in for by rule (block sizes 64 and 256; 256 for the states of optimizers);
  stored bytes equal those of bitsandbytes 0.50.2. Outlier columns of LLM.int8() are not counted, they depend on the data.
  Paged states are on the host, but for the largest. Adapters over a quantised model train in bfloat16 (TRL).
- The optimizer's states are those of the second step on. Trained weights have the dtype they were loaded in; only ZeRO adds
  float32 masters.
- Several processes: DDP adds buckets as large as the gradients; ZeRO and FSDP divide optimizer states, gradients and weights
  evenly, and hold two whole layers with divided weights. Their communication buffers are not counted.
- Rows are as long as said, each with its images; every row behind the first has one position of padding. With
  `assistant_only_loss` image tokens take no part in the loss, all others do.
- Not counted: evaluation during training, callbacks that copy weights, `torch.compile`.
"""
