"""The messages between agent and engine child, the options of both engines, and the fake engine. No llama.cpp here."""
