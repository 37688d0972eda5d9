"""The experiments of the DDPNOpt paper: what is run, and what its figures say about each claim."""
