"""Folders and Hub repositories: two files found, read with care and replaced together; cards; uploads."""
