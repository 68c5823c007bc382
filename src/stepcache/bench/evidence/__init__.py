"""Evidence on one's own model and machine: what is run (`setup`), the runs (`session`), what came of it (`rows`)."""
