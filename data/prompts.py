"""LLaVA-1.5's prompt forms, and what a question, an answer and a conversation must be to be trained on.

The forms are those of Liu et al. 2023 (arXiv:2310.03744, appendix A) and of docs/Evaluation.md of haotian-liu/LLaVA.
"""

from collections import Counter
from collections.abc import Sequence

from .rows import BadRowError

IMAGE_TOKEN = "<image>"
SHORT_ANSWER = "Answer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."
OCR_TOKENS = "Reference OCR token: "
# ADE20K has labels and no questions: these are ours.
SCENE = "What scene is shown in the image?"
OBJECTS = "What is in the image? List the names, separated by commas."


def short_answer(question: str, ocr_tokens: Sequence[str] = ()) -> str:
    """The question as LLaVA asks for a short answer; one that already ends so (LLaVA's own files) stays."""
    if question.endswith(SHORT_ANSWER):
        return question
    reference = f"{OCR_TOKENS}{', '.join(ocr_tokens)}\n" if ocr_tokens else ""
    return f"{question}\n{reference}{SHORT_ANSWER}"


def checked_text(row_id: str, name: str, value: object) -> str:
    """`value` without the space around it.

    Raises:
        BadRowError: not text, empty, or with a placeholder, which would be taken for an image.
    """
    if not isinstance(value, str):
        raise BadRowError(row_id, f"{name} is {_kind(value)}; wanted text")
    value = value.strip()
    if not value:
        raise BadRowError(row_id, f"{name} is empty")
    if IMAGE_TOKEN in value:
        raise BadRowError(row_id, f"{name} holds {IMAGE_TOKEN}")
    return value


def checked_list(row_id: str, name: str, value: object) -> list:
    """`value`, which must be a list with something in it."""
    if not isinstance(value, list):
        raise BadRowError(row_id, f"{name} is {_kind(value)}; wanted a list")
    if not value:
        raise BadRowError(row_id, f"{name} is empty")
    return value


def checked_answers(row_id: str, value: object) -> tuple[list[str], str]:
    """(all annotators' answers, the one that most of them gave; of several, the one given first).

    An answer is text or, as in VQA, has it under "answer". An annotator may have said nothing, but not all of them.
    """
    answers = checked_list(row_id, "answers", value)
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    for answer in answers:
        if not isinstance(answer, str):
            raise BadRowError(row_id, f"answer is {_kind(answer)}; wanted text")
    answers = [answer.strip() for answer in answers]
    said = Counter(answer for answer in answers if answer).most_common(1)
    return answers, checked_text(row_id, "answer", said[0][0] if said else "")


def image_position(row_id: str, value: object, images: int) -> tuple[str, str]:
    """(question without placeholders, "start" or "end") of a conversation's first question.

    One placeholder inside the text counts as one at the start, where LLaVA's `preprocess_multimodal` moves it.

    Raises:
        BadRowError: not text or empty, or not one placeholder per image, or several of them inside the text.
    """
    if not isinstance(value, str):
        raise BadRowError(row_id, f"question is {_kind(value)}; wanted text")
    found = value.count(IMAGE_TOKEN)
    if found != images:
        raise BadRowError(row_id, f"{found} {IMAGE_TOKEN} in the first question for {images} images")
    parts = [part.strip() for part in value.split(IMAGE_TOKEN)]
    if found > 1 and any(parts[1:-1]) or found > 1 and parts[0] and parts[-1]:
        raise BadRowError(row_id, f"{found} {IMAGE_TOKEN} inside the text; wanted them before or after it")
    question = checked_text(row_id, "question", " ".join(part for part in parts if part))
    return question, "end" if found and not parts[-1] else "start"


def llava_turns(row_id: str, conversations: object, images: int) -> tuple[list[tuple[str, str]], str]:
    """(turns, where `<image>` stood) of LLaVA's `[{"from": "human" | "gpt", "value": text}, ...]`."""
    roles = []
    messages = checked_list(row_id, "conversations", conversations)
    for message in messages:
        if not isinstance(message, dict):
            raise BadRowError(row_id, f"a message is {_kind(message)}; wanted from and value")
        roles.append(message.get("from"))
    if roles != ["human", "gpt"] * (len(roles) // 2) or not roles:
        shown = ", ".join(map(str, roles[:6])) + (", ..." if len(roles) > 6 else "")
        raise BadRowError(row_id, f"roles are {shown}; wanted human, gpt in turn")
    values = [message.get("value") for message in messages]
    first, at = image_position(row_id, values[0], images)
    questions = [first] + [checked_text(row_id, "question", value) for value in values[2::2]]
    answers = [checked_text(row_id, "answer", value) for value in values[1::2]]
    return list(zip(questions, answers, strict=True)), at


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__
