"""The subcommands: arguments and printing only."""
