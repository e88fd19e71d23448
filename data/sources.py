"""The public datasets by name, and which of a set's two readers a source is for."""

from collections.abc import Callable
from dataclasses import dataclass

from .ade20k import ade_files, ade_rows
from .captions import coco_files, coco_rows, flickr_files, flickr_rows
from .files import is_saved, matching, row_files
from .llava import llava_files, llava_rows
from .questions import (
    POPE_KINDS,
    gqa_files,
    gqa_rows,
    ocrvqa_files,
    ocrvqa_rows,
    pope_files,
    pope_rows,
    textvqa_files,
    textvqa_rows,
    vqav2_files,
    vqav2_rows,
)
from .request import Parsed, Request


@dataclass(frozen=True)
class Source:
    """A dataset.

    Attributes:
        patterns: names of original files; a folder with one of them is read by `files`.
        files: reads the original files.
        rows: reads a mirror's rows.
        captions: every answer is a caption of the image, and as good to train on as the first.
    """

    patterns: tuple[str, ...]
    files: Callable[[Request], Parsed]
    rows: Callable[[Request], Parsed]
    captions: bool = False


_PRETRAIN, _INSTRUCT = "blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"
SOURCES: dict[str, Source] = {
    "llava_pretrain": Source(
        (_PRETRAIN,), llava_files(_PRETRAIN), llava_rows(_PRETRAIN, ("liuhaotian/LLaVA-Pretrain",))
    ),
    "llava_instruct": Source(
        (_INSTRUCT,), llava_files(_INSTRUCT), llava_rows(_INSTRUCT, ("liuhaotian/LLaVA-Instruct-150K",))
    ),
    "textvqa": Source(("TextVQA_[0-9]*.json",), textvqa_files, textvqa_rows),
    "ocrvqa": Source(("dataset.json",), ocrvqa_files, ocrvqa_rows),
    "vqav2": Source(("v2_OpenEnded_*.json",), vqav2_files, vqav2_rows),
    "gqa": Source(("*_balanced_questions.json",), gqa_files, gqa_rows),
    "pope": Source(tuple(f"*pope_{kind}.json*" for kind in POPE_KINDS), pope_files, pope_rows),
    "coco_captions": Source(("captions_*.json",), coco_files, coco_rows, captions=True),
    "flickr30k": Source(
        ("dataset_flickr30k.json", "flickr_annotations_30k.csv", "results*.token"),
        flickr_files,
        flickr_rows,
        captions=True,
    ),
    "ade20k": Source(("sceneCategories.txt",), ade_files, ade_rows),
}


def read_source(name: str, request: Request) -> Parsed:
    """The examples of a set, and the errors of its bad rows; files and columns are checked before the first."""
    source = SOURCES[name]
    path = request.path
    if path.is_file():
        return (source.rows if path.suffix == ".parquet" else source.files)(request)
    if path.is_dir():
        if any(next(matching(path, pattern), None) for pattern in source.patterns):
            return source.files(request)
        if not is_saved(path) and not row_files(path):
            raise ValueError(
                f"{path} holds no {name}: wanted {' or '.join(source.patterns)}, or parquet files as on the Hub."
            )
    elif request.source.count("/") != 1 or request.source.startswith((".", "/", "~")):
        raise ValueError(f"{request.source} does not exist.")
    return source.rows(request)
