"""Results that are computed once and read in every epoch: encoded pairs and reference errors. They survive a kill."""
