"""The mains of the drop-in scripts; `tools/bundle.py` builds each into one self-contained file."""
