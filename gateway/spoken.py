"""What an answer consists of while it comes: text, and tool calls if there are tools."""

from __future__ import annotations

from typing import Protocol

from llambo.gateway.tool_calls import Content, Delta, ToolCalls


class Parser(Protocol):
    def feed(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class Plain:
    """Without tools nothing looks like a call."""

    def feed(self, text: str) -> list[Delta]:
        return [Content(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


def parser_of(tools: bool, seed: str, prefix: str) -> Parser:
    return ToolCalls(seed, prefix=prefix) if tools else Plain()


def deltas_of(text: str, tools: bool, seed: str, prefix: str) -> list[Delta]:
    """Of a whole answer."""
    parser = parser_of(tools, seed, prefix)
    return [*parser.feed(text), *parser.finish()]
