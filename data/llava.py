"""LLaVA-1.5's own conversations: the captions of its first stage and the mix of its second."""

from collections.abc import Callable
from dataclasses import replace

from .files import choose_split, hub_file, json_items, stored_rows
from .images import stored_image
from .prompts import checked_text, llava_turns
from .request import Parsed, Request, parsed
from .rows import Example


def llava_example(row: dict, find_image: Callable[[str, object], dict]) -> Example:
    """An example of one of LLaVA's records.

    Args:
        row: `id`, `conversations`, and `image`: one, a list, or none.
        find_image: the image of a row's id and of one value of `image`.

    Raises:
        BadRowError: the conversation has not LLaVA's form, or an image is missing.
    """
    row_id = str(row["id"])
    names = row.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    turns, at = llava_turns(row_id, row["conversations"], len(names))
    images = [find_image(row_id, name) for name in names]
    answers = [turns[0][1]] if len(turns) == 1 else []
    image_id = name if len(names) == 1 and isinstance(name := names[0], str) else row_id
    return Example(row_id, images, turns, answers, image_id=image_id, image_at=at)


def llava_files(pattern: str) -> Callable[[Request], Parsed]:
    """A reader of LLaVA's JSON, by the pattern of its file's name."""

    def files(request: Request) -> Parsed:
        """A JSON array of `{"id", "image"?, "conversations"}`; `image` is relative to the images' folder."""
        choose_split(request.split, ["train"], request.source)

        def find_image(row_id: str, name: object) -> dict:
            return request.image(row_id, checked_text(row_id, "image", name))

        return parsed(json_items(request.file(pattern)), lambda row: llava_example(row, find_image))

    return files


def llava_rows(hub_name: str, repos: tuple[str, ...]) -> Callable[[Request], Parsed]:
    """A reader of rows from the Hub; of `repos` it downloads `hub_name`, the JSON, and reads that."""

    def rows(request: Request) -> Parsed:
        """liuhaotian's repositories hold the JSON alone (`images` says where the images lie); others have rows with
        `id`, `image` and `conversations`."""
        if request.source in repos:
            if request.images is None:
                raise ValueError(
                    f"{request.source} holds no images as files; give the folder that they lie in."
                )
            path = hub_file(request.source, hub_name)
            return llava_files(hub_name)(replace(request, source=str(path)))
        wanted = ["id", "image", "conversations"]

        def find_image(row_id: str, value: object) -> dict:
            return stored_image(row_id, value, request.images or request.folder)

        return parsed(stored_rows(request.open(wanted), wanted), lambda row: llava_example(row, find_image))

    return rows
