"""What is computed once and read in every epoch, in files that survive a kill: encoded pairs, errors of a reference."""
