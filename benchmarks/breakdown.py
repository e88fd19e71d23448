"""Where the time to first token goes: milliseconds of each stage of one call.

Each stage is one function of ours or of transformers, wrapped for the duration of the measurement. A stage's time is its
own: what a stage inside it takes is counted there and not twice, and what no stage covers is `generate and the rest`. On a
GPU the kernels run behind the Python that launches them: `synchronize=True` waits for them at every stage's end, which
tells what each stage costs by itself, and `False` tells how long the host is busy with it.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

# stage -> functions, as "module:attribute path". `tests/benchmarks/test_breakdown.py` looks each one up.
STAGES = {
    "detector": ("backdrop.benchmarks.planted_detector:PlantedDetector.detect",),
    "decode and resize": (
        "backdrop.processing.image_processing_backdrop:prepared_images",
        "transformers.models.clip.image_processing_clip:CLIPImageProcessor._preprocess",
    ),
    "match": (
        "backdrop.processing.background_matching_backdrop:BackgroundMatcher.find",
        "backdrop.processing.background_matching_backdrop:BackgroundMatcher.accept",
        "backdrop.processing.background_matching_backdrop:BackgroundMatcher.miss",
    ),
    "normalise": ("backdrop.processing.image_processing_backdrop:BackdropImageProcessor._pixel_values",),
    "tokenise": ("transformers:PreTrainedTokenizerFast._encode_plus",),
    "key": (
        "backdrop.modeling.group_features_backdrop:tokens_run_key",
        "backdrop.modeling.prefill_backdrop:prefix_run_key",
        "backdrop.modeling.group_features_backdrop:content_keys",
    ),
    "tower": (
        "backdrop.modeling.group_features_backdrop:encode_groups",
        "transformers.models.clip.modeling_clip:CLIPVisionModel.forward",
    ),
    "prefix copy": ("backdrop.modeling.prefix_pass_backdrop:_fill",),
    "language model": ("transformers.models.llama.modeling_llama:LlamaModel.forward",),
}
REST = "generate and the rest"


@dataclass
class StageClock:
    """Seconds by stage; `stages` may nest, and each second is counted once."""

    synchronize: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    def timed(self, stage: str, function: Callable) -> Callable:
        """`function`, with its own time added to the stage."""

        def run(*args, **kwargs):
            self._inner.append(0.0)
            started = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                took = self._now() - started
                self.seconds[stage] = self.seconds.get(stage, 0.0) + took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return run

    def _now(self) -> float:
        if self.synchronize and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def find(target: str) -> tuple[object, str]:
    """What holds the function `module:attribute path`, and its name there.

    Raises:
        AttributeError, ImportError: there is no such function.
    """
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    getattr(owner, name)
    return owner, name


@contextlib.contextmanager
def measured(clock: StageClock) -> Iterator[StageClock]:
    """Inside the `with` block every stage of `STAGES` is timed. Not for several threads at a time."""
    with contextlib.ExitStack() as stack:
        for stage, targets in STAGES.items():
            for target in targets:
                owner, name = find(target)
                inherited = name not in vars(owner)
                original = getattr(owner, name)
                setattr(owner, name, clock.timed(stage, original))
                if inherited:
                    stack.callback(delattr, owner, name)
                else:
                    stack.callback(setattr, owner, name, original)
        yield clock


def breakdown(call: Callable[[], float], repeats: int, synchronize: bool) -> dict[str, float]:
    """Median milliseconds of each stage over `repeats` calls, and of the whole call as `total`.

    Args:
        call: answers once and returns the seconds it took.
    """
    samples: list[dict[str, float]] = []
    for _ in range(repeats):
        clock = StageClock(synchronize)
        with measured(clock):
            total = call()
        known = {stage: clock.seconds.get(stage, 0.0) for stage in STAGES}
        samples.append({**known, REST: total - sum(known.values()), "total": total})
    return {
        stage: 1000 * sorted(sample[stage] for sample in samples)[len(samples) // 2] for stage in samples[0]
    }


def render(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table: a row a stage, a column a mode, milliseconds."""
    modes = list(rows)
    stages = list(next(iter(rows.values())))
    lines = [f"| ms | {' | '.join(modes)} |", "|---|" + "---:|" * len(modes)]
    lines += [
        f"| {stage} | " + " | ".join(f"{rows[mode][stage]:.1f}" for mode in modes) + " |" for stage in stages
    ]
    return "\n".join(lines)
