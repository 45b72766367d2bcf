"""What the Makefile and CI call before there is a virtual environment: standard library only."""
