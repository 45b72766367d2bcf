"""What agent and engine child say to each other, and the fake engine. No llama.cpp here."""
