"""Tools: how a model calls them, and what they may be called. Worker and gateway agree on it here.

A call stands in the text of an answer, in the form that Hermes models were the first to learn:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

It is the only form, whatever the model: a grammar sees to it.
"""

from __future__ import annotations

import re

#: Around a call.
BEGIN, END = "<tool_call>", "</tool_call>"
#: What a tool may be called. Nothing in it needs an escape in JSON or in a grammar.
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
