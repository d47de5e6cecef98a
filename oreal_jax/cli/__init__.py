"""The command `oreal`: one module for each group of verbs."""

from oreal_jax.cli.command_line import command, main, parser

__all__ = ["command", "main", "parser"]
