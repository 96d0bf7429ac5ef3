"""Messages of a conversation, before a chat template makes a prompt of them."""

from __future__ import annotations

from typing import Any

from loraplex.engine.errors import describe

Message = dict[str, Any]


def check_messages(conversation: Any) -> list[Message]:
    """The messages as templates know them: their texts in one piece. Raises ValueError."""
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError(
            f"messages={describe(conversation)} is not allowed: it must be a list of messages, at "
            "least one"
        )
    return [_check_message(message) for message in conversation]


def _check_message(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"the message {describe(message)} is not allowed: it must be a dict with role and "
            "content"
        )
    return message | {"content": join_text_parts(message.get("content"))}


def join_text_parts(content: Any) -> Any:
    """The text of a message whose content comes in parts; other contents as they are."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"}):
            raise ValueError(f"the part {describe(part)} is not supported: it must be a text part")
        if part["type"] != "text" or not isinstance(part["text"], str):
            raise ValueError(f"the part {describe(part)} is not supported: it must be a text part")
    return "\n".join(part["text"] for part in content)
