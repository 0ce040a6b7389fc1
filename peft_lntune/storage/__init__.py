"""The files of an adapter: their contents, and checks that they are complete."""
