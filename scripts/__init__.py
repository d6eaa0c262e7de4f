"""The commands: `lamoe <command> ...`, or `python scripts/<command>.py ...` from a clone."""
