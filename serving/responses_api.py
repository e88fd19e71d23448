"""`POST /v1/responses`, which newer clients prefer: read as a chat, its answer written in the other API's form.

Nothing is stored: `previous_response_id` and the like are refused, and clients send the whole conversation.
"""

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.responses import Response

from .problems import ApiError
from .streaming import EventStream

# Fields that would need a store, or a worker that goes on when the client has left.
_STORED = ("previous_response_id", "conversation", "background")
# Fields of this API alone that mean nothing here.
_DROPPED = ("include", "truncation", "reasoning", "max_tool_calls", "stream_options", "store")


class ResponsesRequest:
    """One request of the responses API, and its answer.

    Args:
        body: any JSON value.

    Raises:
        ApiError: 400, it is no such request, or needs what is not there.
    """

    def __init__(self, body: object):
        if not isinstance(body, dict):
            raise ApiError(400, f"the body is a {type(body).__name__}; wanted a JSON object", "invalid_body")
        self._body = {name: value for name, value in body.items() if value is not None}
        for name in _STORED:
            if self._body.get(name) not in (None, False):
                raise ApiError(
                    400,
                    f"{name} cannot be set: responses are not stored here; wanted the whole conversation in input",
                    "field_refused",
                )
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())

    def chat(self) -> dict:
        """The body of the same request to the chat completions API.

        Raises:
            ApiError: 400, names what cannot be read.
        """
        rest = dict(self._body)
        for name in (*_STORED, *_DROPPED):
            rest.pop(name, None)
        messages = _messages(rest.pop("input", None))
        instructions = rest.pop("instructions", None)
        if instructions is not None:
            messages.insert(0, {"role": "system", "content": instructions})
        text = rest.pop("text", None)
        found_format = text.get("format") if isinstance(text, dict) else None
        if isinstance(found_format, dict) and found_format.get("type") == "json_schema":
            schema = {name: value for name, value in found_format.items() if name != "type"}
            found_format = {"type": "json_schema", "json_schema": schema}
        if found_format is not None:
            rest["response_format"] = found_format
        if isinstance(rest.get("tools"), list):
            rest["tools"] = [_tool(tool) for tool in rest["tools"]]
        choice = rest.get("tool_choice")
        if isinstance(choice, dict) and "name" in choice:
            rest["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
        return rest | {"messages": messages}

    def answer(self, response: Response) -> Response:
        """The chat's response in the form of this API; a refusal as it is."""
        if isinstance(response, EventStream):
            response.body_iterator = self._events(response.events)
        elif response.status_code == 200:
            chat = json.loads(response.body)
            choice = chat["choices"][0]
            output = _Output(choice["message"].get("content"), choice["message"].get("tool_calls"))
            final = self._final(chat, output.items(), choice.get("finish_reason"), chat.get("usage"))
            response.body = json.dumps(final, ensure_ascii=False).encode()
            response.headers["content-length"] = str(len(response.body))
        return response

    def _response(self, model: str | None, status: str, output: list[dict], **fields: Any) -> dict:
        asked = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "metadata": asked.get("metadata") or {},
            "model": model,
            "output": output,
            "parallel_tool_calls": asked.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": asked.get("temperature"),
            "text": asked.get("text") or {"format": {"type": "text"}},
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": asked.get("tools") or [],
            "top_p": asked.get("top_p"),
            "truncation": "disabled",
            "usage": None,
            **fields,
        }

    def _final(self, chat: dict, output: list[dict], finish: str | None, usage: dict | None) -> dict:
        cut = finish == "length"
        return self._response(
            chat.get("model"),
            "incomplete" if cut else "completed",
            output,
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage=_usage(usage),
        )

    async def _events(self, chat_events: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The events of this API, from those of a chat; comment lines pass."""
        number = 0
        output, model, finish, usage, failed = _Output(), None, None, None, False

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            data = json.dumps({"type": kind, "sequence_number": number, **fields}, ensure_ascii=False)
            number += 1
            return f"event: {kind}\ndata: {data}\n\n".encode()

        for kind in ("response.created", "response.in_progress"):
            yield event(kind, response=self._response(self._body.get("model"), "in_progress", []))
        async for line in chat_events:
            if line.startswith(b":"):
                yield line
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[len(b"data: ") :])
            model, usage = chunk.get("model") or model, chunk.get("usage") or usage
            if "error" in chunk:
                failed = True
                error = (
                    chunk["error"] if isinstance(chunk["error"], dict) else {"message": str(chunk["error"])}
                )
                code, message = error.get("code") or "server_error", error.get("message")
                failure = {"code": "server_error", "message": message}
                yield event("error", code=str(code), message=message, param=None)
                yield event("response.failed", response=self._response(model, "failed", [], error=failure))
            for choice in chunk.get("choices") or ():
                finish = choice.get("finish_reason") or finish
                for kind, fields in output.take(choice.get("delta") or {}):
                    yield event(kind, **fields)
        if not failed:
            for kind, fields in output.end():
                yield event(kind, **fields)
            final = self._final({"model": model}, output.items(), finish, usage)
            yield event(f"response.{final['status']}", response=final)


class _Output:
    """The items of an answer, whole or growing: the text first, then each call.

    Args:
        text: of the answer.
        calls: its tool calls, as a chat has them.
    """

    def __init__(self, text: str | None = None, calls: list[dict] | None = None):
        self._order: list[dict] = []
        self._message: dict | None = None
        self._calls: dict[int, dict] = {}
        self._open: dict | None = None
        list(self.take({"content": text, "tool_calls": calls}))

    def items(self) -> list[dict]:
        """What there is, as complete."""
        return [item | {"status": "completed"} for item in self._order]

    def take(self, delta: dict) -> list[tuple[str, dict]]:
        """Takes a piece of the answer in; the events that it causes, each a type and its fields."""
        events: list[tuple[str, dict]] = []
        if delta.get("content"):
            if self._message is None:
                self._message = {
                    "id": f"msg_{uuid.uuid4().hex}",
                    "type": "message",
                    "role": "assistant",
                    "content": [],
                }
                events += self._begin(self._message)
                self._message["content"] = [_text_part("")]
                events.append(("response.content_part.added", self._where(part=_text_part(""))))
            self._message["content"][0]["text"] += delta["content"]
            events.append(("response.output_text.delta", self._where(delta=delta["content"], logprobs=[])))
        for number, call in enumerate(delta.get("tool_calls") or ()):
            function, index = call.get("function") or {}, call.get("index", number)
            item = self._calls.get(index)
            if item is None:
                item = self._calls[index] = {
                    "id": f"fc_{uuid.uuid4().hex}",
                    "type": "function_call",
                    "call_id": call.get("id") or f"call_{index}",
                    "name": "",
                    "arguments": "",
                }
                item["name"] = function.get("name") or ""
                events += self._begin(item)
            if function.get("arguments"):
                item["arguments"] += function["arguments"]
                place = {"item_id": item["id"], "output_index": self._order.index(item)}
                events.append(
                    ("response.function_call_arguments.delta", place | {"delta": function["arguments"]})
                )
        return events

    def end(self) -> list[tuple[str, dict]]:
        """The events that close what is open."""
        item, self._open = self._open, None
        if item is None:
            return []
        place = {"item_id": item["id"], "output_index": self._order.index(item)}
        if item["type"] == "message":
            part = item["content"][0]
            place |= {"content_index": 0}
            events = [
                ("response.output_text.done", place | {"text": part["text"], "logprobs": []}),
                ("response.content_part.done", place | {"part": part}),
            ]
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            events = [("response.function_call_arguments.done", place | done)]
        whole = {"output_index": place["output_index"], "item": item | {"status": "completed"}}
        return [*events, ("response.output_item.done", whole)]

    def _begin(self, item: dict) -> list[tuple[str, dict]]:
        events = self.end()
        self._order.append(item)
        self._open = item
        fields = {"output_index": len(self._order) - 1, "item": item | {"status": "in_progress"}}
        return [*events, ("response.output_item.added", fields)]

    def _where(self, **fields: Any) -> dict:
        message = self._message or {}
        place = {"item_id": message["id"], "output_index": self._order.index(message), "content_index": 0}
        return place | fields


def _text_part(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: dict | None) -> dict | None:
    if not usage:
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    prompt, answer = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + answer,
        "backdrop": usage.get("backdrop"),
    }


def _tool(tool: Any) -> Any:
    """A tool in the chat's form; what is no function stays, and is refused there."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _messages(given: Any) -> list[dict]:
    """The messages of an `input`."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiError(400, "input is missing or empty; wanted a text or a list", "invalid_body")
    found: list[dict] = []
    for number, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            found.append({name: value for name, value in item.items() if name != "type"})
        elif kind == "function_call":
            call = {
                "id": item.get("call_id"),
                "function": {"name": item.get("name"), "arguments": item.get("arguments")},
            }
            if not found or found[-1].get("role") != "assistant":
                found.append({"role": "assistant", "content": None})
            found[-1]["tool_calls"] = [*found[-1].get("tool_calls", ()), call]
        elif kind == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif (
            kind != "reasoning"
        ):  # what a server thought is for the server that wrote it, and often encrypted
            wanted = "message, function_call or function_call_output"
            raise ApiError(400, f"input[{number}] has the type {kind!r:.40}; wanted {wanted}", "invalid_body")
    return found
