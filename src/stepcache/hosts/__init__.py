"""Where a StepCache is put into a codebase: one codebase, one file."""
