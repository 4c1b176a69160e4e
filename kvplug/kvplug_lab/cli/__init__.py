"""Commands of the laboratory, one file each."""
