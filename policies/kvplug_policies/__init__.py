"""The policies kvplug ships. They come in through the same entry point as anybody's."""
