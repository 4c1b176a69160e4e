"""The shadow: approximate answers are answered again exactly, and a test decides what follows."""
