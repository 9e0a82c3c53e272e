"""Run directories and commands: from the command line to finished stages and back."""
