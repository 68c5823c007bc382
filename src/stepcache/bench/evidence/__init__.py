"""Evidence on your own model and machine: what is run (`setup`), the runs (`session`), the results (`rows`)."""
