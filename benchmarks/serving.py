"""Time to first token under load, on one engine: frames split, frames whole, and stock LLaVA.

    backdrop bench serving --minutes 30 --json serving.json
    backdrop bench serving --shape clip-l+135m --minutes 20 --cameras 4 --concurrency 2 --json serving-clip-l.json

Three ways take turns, in slices, against servers that run all the while:

- `split`: `backdrop serve`: the gateway splits and matches, vLLM's Transformers backend answers;
- `whole`: the same engine behind `--no-split`: every frame is one background group;
- `llava`: the same weights as a `LlavaForConditionalGeneration` checkpoint on the same backend, without a gateway.

`--concurrency` clients each ask again as soon as they have their answer; every frame is new, as a camera's are. With
`--shape` the weights are random: answers mean nothing, times are those of the shape.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from backdrop.hub_export.chat_template import chat_template
from backdrop.hub_export.checkpoint import load_checkpoint
from backdrop.hub_export.export import export
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.serving.engine_settings import EngineSettings, find_engine_python
from backdrop.serving.sizing import batched_tokens, kv_cache_bytes

from .contenders import backdrop_processor, build_llava, llava_processor, sharing_backdrop
from .frames import background_image, draw_frame
from .planted_detector import build_detector, build_yolo
from .report import machine, versions, write_json_atomically
from .shapes import QUESTION, SHAPES
from .traffic import Ask, Outcome, SceneTraffic, drive, is_foreign, png_url, summarize

MODES = ("split", "whole", "llava")
# Detections cannot explain drawn noise: where a frame's object is and where its reference's was both count as overridden.
SHAPE_MATCHING = {"max_overridden": 0.3}
WARM_UP_SECONDS = 10
START_SECONDS = 600
MODEL = "backdrop"


class ShapeTraffic:
    """Frames at a shape's size, a share of whose patches is new each time; answers mean nothing."""

    def __init__(self, shape: str, cameras: int, fresh_share: float, seed: int = 0):
        self._shape, self._share = SHAPES[shape], fresh_share
        self._backgrounds = [background_image(*self._shape.source, seed=seed + i) for i in range(cameras)]
        self.names: dict[str, int] = {}

    def draw(self, rng: random.Random) -> Ask:
        """The next request."""
        camera = rng.randrange(len(self._backgrounds))
        frame = draw_frame(
            self._backgrounds[camera], self._shape, self._share, np.random.default_rng(rng.randrange(2**31))
        )
        return Ask(camera, png_url(frame.image), QUESTION, "", False)


def stock_llava(
    model: BackdropForConditionalGeneration, processor: BackdropProcessor
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The same weights as stock LLaVA (separators stay unused)."""
    config, images = model.config, processor.image_processor
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_id,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_seq_length=config.num_patches + config.extra_tokens_per_group,
            tie_word_embeddings=config.text_config.tie_word_embeddings,
        )
    )
    stock.load_state_dict(model.state_dict())
    stock_images = CLIPImageProcessor(
        size=dict(images.size),
        crop_size=dict(images.crop_size),
        image_mean=images.image_mean,
        image_std=images.image_std,
    )
    return stock, LlavaProcessor(
        stock_images,
        processor.tokenizer,
        patch_size=images.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )


def make_folders(model: str | None, shape: str | None, folder: Path) -> tuple[Path, Path]:
    """(Backdrop's folder, stock LLaVA's folder)."""
    if shape is None:
        if model is None:
            raise ValueError("model and shape are both None; wanted one of the two.")
        pair = load_checkpoint(model)
        backdrop, llava = Path(model), stock_llava(*pair)
    else:
        weights = build_llava(SHAPES[shape], "cpu", torch.float32)
        processor = backdrop_processor(SHAPES[shape], build_detector("cpu"))
        # A network of real size that a folder can carry; what it finds in these frames does not matter.
        processor.image_processor.set_detector(build_yolo("cpu"))
        stock_processor = llava_processor(SHAPES[shape])
        processor.chat_template = stock_processor.chat_template = chat_template("")
        backdrop = folder / "backdrop"
        export(sharing_backdrop(weights), processor, backdrop)
        llava = weights, stock_processor
    for part in llava:
        part.save_pretrained(folder / "llava")
    return backdrop, folder / "llava"


def run_serving(
    model: str | None,
    shape: str | None,
    minutes: float,
    cameras: int,
    concurrency: int,
    slice_seconds: float,
    fresh_share: float,
    engine_python: str | None = None,
    json_path: Path | None = None,
) -> dict:
    """Figures by mode; written after every round.

    Args:
        model: exported folder; its own scenes are asked about. Or:
        shape: of `shapes.SHAPES`.
        minutes: of load in all, shared by the modes.
    """
    python = find_engine_python(engine_python)
    traffic = SceneTraffic(cameras) if shape is None else ShapeTraffic(shape, cameras, fresh_share)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="backdrop-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        with console.status("writing models"):
            backdrop, llava = make_folders(model, shape, folder)
        with console.status("starting two engines and two gateways"):
            matching = {} if shape is None else SHAPE_MATCHING
            urls = stack.enter_context(
                _servers(backdrop, llava, python, folder, cameras, concurrency, matching)
            )
        outcomes: dict[str, list[Outcome]] = {mode: [] for mode in MODES}
        spent = dict.fromkeys(MODES, 0.0)
        for mode in MODES:
            asyncio.run(drive(urls[mode], MODEL, traffic.draw, WARM_UP_SECONDS, concurrency, seed=-1))
        rounds = max(1, round(minutes * 60 / (len(MODES) * slice_seconds)))
        report: dict = {}
        for turn in tqdm(range(rounds), desc="rounds"):
            for mode in MODES if turn % 2 == 0 else MODES[::-1]:
                started = time.perf_counter()
                outcomes[mode] += asyncio.run(
                    drive(urls[mode], MODEL, traffic.draw, slice_seconds, concurrency, seed=turn)
                )
                spent[mode] += time.perf_counter() - started
            report = {
                "model": model or shape,
                "minutes": round(sum(spent.values()) / 60, 2),
                "cameras": cameras,
                "concurrency": concurrency,
                "slice_seconds": slice_seconds,
                "fresh_share": fresh_share if shape else None,
                "matching": matching,
                "foreign": [
                    {"mode": m, "question": o.ask.question, "right": o.ask.answer, "answer": o.text}
                    for m in MODES
                    for o in outcomes[m]
                    if is_foreign(o, traffic.names)
                ],
                "modes": {m: asdict(summarize(outcomes[m], traffic.names, spent[m])) for m in MODES},
                "machine": machine("cpu"),
                "versions": versions(),
            }
            if json_path is not None:
                write_json_atomically(json_path, report)
    return report


@contextlib.contextmanager
def _servers(
    backdrop: Path, llava: Path, python: str, folder: Path, cameras: int, concurrency: int, matching: dict
) -> Iterator[dict]:
    from backdrop.modeling.configuration_backdrop import BackdropConfig

    engine, stock, split, whole = _free_ports(4)
    config = BackdropConfig.from_pretrained(backdrop)
    length = min(config.text_config.max_position_embeddings, 2 * config.num_patches + 256)
    sequences = max(4, concurrency)
    common = {
        "python": python,
        "name": MODEL,
        "dtype": "float32",
        "max_model_len": length,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": batched_tokens(config, 4 * cameras, sequences, length),
        "kv_cache_bytes": kv_cache_bytes(config, 4 * cameras, sequences, length, 32, "float32"),
        "block_size": 32,
        "extra": ("--enforce-eager",),
    }
    first = EngineSettings(model=str(backdrop), port=engine, **common)
    second = EngineSettings(model=str(llava), port=stock, **common)
    environment = {**first.environment(), "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    gateway = [sys.executable, "-m", "backdrop", "serve", str(backdrop), "--replica", first.url, "--port"]
    (folder / "gateway.yaml").write_text(json.dumps({"matching": matching}))  # JSON is YAML
    gateway[-1:-1] = ["--config", str(folder / "gateway.yaml")]
    commands = {
        "engine": first.command(),
        "stock": [word for word in second.command() if word not in ("--trust-remote-code",)],
        "split": [*gateway, str(split)],
        "whole": [*gateway, str(whole), "--no-split"],
    }
    commands["stock"] = _stock_flags(commands["stock"])
    urls = {"engine": first.url, "stock": second.url}
    urls |= {name: f"http://127.0.0.1:{port}" for name, port in (("split", split), ("whole", whole))}
    running: dict[str, subprocess.Popen] = {}
    # Ended by a signal, the servers end with us.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for names in (("engine", "stock"), ("split", "whole")):
            for name in names:
                with (folder / f"{name}.log").open("wb") as log:
                    running[name] = subprocess.Popen(
                        commands[name], stdout=log, stderr=log, env=environment, start_new_session=True
                    )
            for name in names:
                _wait(running[name], urls[name], folder / f"{name}.log")
        yield {"split": urls["split"], "whole": urls["whole"], "llava": urls["stock"]}
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _stock_flags(command: list[str]) -> list[str]:
    """The engine's flags without those that patch groups need: stock LLaVA keeps vLLM's processor cache and gets RGB images."""
    kept = list(command)
    for flag in ("--media-io-kwargs", "--mm-processor-cache-gb"):
        at = kept.index(flag)
        del kept[at : at + 2]
    return kept


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    kept = Path(shutil.copy(log, tempfile.gettempdir()))
    raise RuntimeError(f"{log.stem} did not start; its log is {kept}: {log.read_text()[-600:]}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def render_markdown(report: dict) -> str:
    """A row a mode: requests, answers, times in milliseconds (and as ratios to those of `llava`), prompt tokens cached."""
    base = report["modes"]["llava"]
    lines = [
        "| way | requests | lost | right | first token p50, ms (of llava's) | p95, ms (of llava's) | requests/s | prompt tokens cached |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for mode, figures in report["modes"].items():
        times = [
            f"{1000 * figures[name]:.0f} ({figures[name] / base[name]:.2f})"
            for name in ("first_token_p50", "first_token_p95")
        ]
        right = "-" if report["model"] in SHAPES else f"{figures['right']:.1%}"
        lines.append(
            f"| {mode} | {figures['requests']} | {figures['lost']} | {right} | {times[0]} | {times[1]} | "
            f"{figures['per_second']:.2f} | {figures['cached']:.1%} |"
        )
    return "\n".join(lines) + "\n"
